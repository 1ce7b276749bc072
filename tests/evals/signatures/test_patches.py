"""What is put on in the study, against formulas; what it is told to be like, it is like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from weightlab_evals.images.corruptions import corruptions
from weightlab_evals.signatures import checkpoints
from weightlab_evals.signatures.checkpoints import Checkpoints
from weightlab_evals.signatures.data import Part
from weightlab_evals.signatures.likeness import cosines, depths, ranks
from weightlab_evals.signatures.patches import FAMILIES, Form, Patches, others
from weightlab_evals.signatures.scores import Choice, Scores
from weightlab_evals.signatures.training import Recipe

import weightlab as wl
from tests.evals.images.machine import with_corruptions

pytestmark = with_corruptions


@pytest.fixture
def have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    """Checkpoints with BatchNorm; training moves weights and statistics by random amounts."""
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path))

    def train(module: torch.nn.Module, shown: Part, recipe: Recipe, seed: int) -> None:
        generator = torch.Generator().manual_seed(int(shown.images.sum()) % 2**31)
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape, generator=generator))

    monkeypatch.setattr(checkpoints, "train", train)
    return Checkpoints("vgg_bn", 0, tmp_path / "checkpoints")


def delta(have: Checkpoints, patch: wl.Patch) -> dict[str, Tensor]:
    """What a patch adds to the clean model."""
    clean = have.tuned("A")
    return {n: wl.apply(clean, patch)[n] - clean[n] for n in patch.records}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(t, expected[n], atol=1e-6) for n, t in found.items())


@pytest.mark.parametrize("norm", ["keep", "robust"])
def test_they_are_what_they_are_called(have: Checkpoints, norm: str) -> None:
    taken, form = Patches(have), Form(2, norm)
    signature = taken.signature("fog", form)
    start, clean, robust = have.start(), have.tuned("A"), have.tuned("A", "fog")
    ours = delta(have, signature)
    convolutions = [n for n in ours if clean[n].ndim == 4]
    assert convolutions == ["features.0.weight", "features.3.weight"]
    for name in convolutions:
        a, d = clean[name] - start[name], robust[name] - start[name]
        assert torch.allclose(ours[name], d - (d * a).sum() / (a * a).sum() * a, atol=1e-6)
    plain, less_clean = (
        delta(have, taken.unprojected("fog", signature)),
        delta(have, taken.from_clean("fog", signature)),
    )
    assert close({n: plain[n] for n in convolutions}, {n: robust[n] - start[n] for n in convolutions})
    assert close({n: less_clean[n] for n in convolutions}, {n: robust[n] - clean[n] for n in convolutions})
    norms = [n for n in ours if "running_" in n]
    assert len(norms) == (12 if norm == "robust" else 0)  # the robust model's, at every depth
    assert close({n: plain[n] for n in norms}, {n: ours[n] for n in norms})


def test_random_is_as_long_tensor_by_tensor(have: Checkpoints) -> None:
    taken = Patches(have)
    signature = taken.signature("fog", Form(4))
    ours, drawn = delta(have, signature), delta(have, taken.random("fog", signature))
    for name, change in ours.items():
        assert torch.isclose(drawn[name].norm(), change.norm(), rtol=1e-3)
    one, other = (torch.cat([d[n].flatten() for n in ours]) for d in (ours, drawn))
    assert abs(torch.nn.functional.cosine_similarity(one, other, dim=0)) < 0.05
    again = delta(have, taken.random("fog", signature))
    assert all(torch.equal(t, drawn[n]) for n, t in again.items())


def test_families_are_all_corruptions_and_others_are_of_other_ones() -> None:
    assert sorted(name for family in FAMILIES.values() for name in family) == sorted(corruptions())
    for name in corruptions():
        (own,) = (family for family in FAMILIES.values() if name in family)
        assert len(others(name)) == 3 and not set(others(name)) & set(own)


def test_a_signature_is_found_in_its_library(have: Checkpoints) -> None:
    names = ["fog", "snow", "contrast"]
    library = {name: Patches(have).signature(name, Form(2)) for name in names}
    assert ranks(library, library) == dict.fromkeys(names, 1)
    turned = {"fog": library["snow"], "snow": library["fog"], "contrast": library["contrast"]}
    assert ranks(turned, library)["fog"] > 1
    found = cosines(library, library)
    assert found["same"] == pytest.approx(1) and found["different"] < 0.9
    by_layer = depths(have, names)
    assert next(iter(by_layer)) == "features.0" and all(value > 0 for value in by_layer.values())


def test_scores_cover_every_row(have: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(2, "recalibrate")
    shown = have.shown

    def few(domain: str, use: str, corruption: str = "clean") -> Part:
        part = shown(domain, use, corruption)
        return Part(part.images[:20], part.labels[:20])

    monkeypatch.setattr(have, "shown", few)
    scored = Scores(have)
    alphas = dict.fromkeys(corruptions(), 0.5)
    choice = Choice(form, dict.fromkeys(("signature", "unprojected", "from clean"), alphas))
    tests = scored.on_tests("fog", choice)
    assert tests.keys() == {"A", "B", "A by alpha", "B by alpha", "A 5-9", "further"}
    assert (
        tests["A"].keys() == tests["B"].keys() and {"statistics", "recalibrated, clean", "2 bits"} <= tests["A"].keys()
    )
    assert all(value * 20 == pytest.approx(round(value * 20)) for value in tests["A 5-9"].values())
    state = wl.apply(have.tuned("A"), Patches(have).signature("fog", form).at(0.5))
    module = have.module()
    module.load_state_dict(state)
    part = few("A", "test", "fog")
    with torch.no_grad():
        right = module(part.images.float() / 255).argmax(1) == part.labels
    assert tests["A"]["signature"] == pytest.approx(float(right.float().mean()))
