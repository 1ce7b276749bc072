"""The forecast of a transfer: by hand, and on real models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import NamesMismatchError
from weightlab.ops.connectivity import Connectivity


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_those_of_the_formulas() -> None:
    base = {
        "layers.0.weight": random(6, 5, seed=0),
        "layers.1.weight": random(4, 6, seed=1),
        "norm.weight": torch.ones(9),
    }
    change, distance = ({n: random(*t.shape, seed=s) for n, t in base.items()} for s in (2, 3))
    tuned = {n: t + 0.1 * change[n] for n, t in base.items()}
    target = {n: t + 0.3 * distance[n] for n, t in base.items()}
    found = wl.connectivity(base, tuned, target)
    matrices = ["layers.0.weight", "layers.1.weight"]

    def flat(state: dict[str, Tensor], names: list[str] = matrices) -> Tensor:
        return torch.cat([state[n].double().flatten() for n in names])

    b, t, m = flat(base), flat(tuned), flat(target)
    assert found.whole.ratio == pytest.approx(float((m - b).norm() / (t - b).norm()), rel=1e-5)
    assert found.whole.distance == pytest.approx(float((m - b).norm() / b.norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    assert found.whole.cosine == pytest.approx(float(cosine(b, m, dim=0)), rel=1e-5)
    assert found.whole.along == pytest.approx(float(cosine(m - b, t - b, dim=0)), abs=1e-5)
    assert [link.layer for link in found.layers] == ["layers.0", "layers.1"]
    one = flat(base, matrices[:1])
    assert found.layers[0].cosine == pytest.approx(float(cosine(one, flat(target, matrices[:1]), dim=0)), rel=1e-5)


def test_three_forecasts() -> None:
    base = {"layers.0.weight": random(40, 40, seed=0)}
    tuned = {"layers.0.weight": base["layers.0.weight"] + 0.01 * random(40, 40, seed=1)}

    def forecast(size: float) -> str:
        target = {"layers.0.weight": base["layers.0.weight"] + size * random(40, 40, seed=2)}
        return wl.connectivity(base, tuned, target).forecast

    assert [forecast(size) for size in (0.0, 0.005, 0.03, 0.14, 0.2, 0.5)] == ["near"] * 4 + ["far"] * 2
    permuted = {"layers.0.weight": base["layers.0.weight"][torch.randperm(40)]}
    assert wl.connectivity(base, tuned, permuted).forecast == "unrelated"
    nothing = wl.connectivity(base, base, tuned)
    assert nothing.whole.ratio is None and nothing.forecast == "far" and math.isfinite(nothing.whole.cosine)


def test_a_part_that_is_unrelated() -> None:
    base = {f"layers.{n}.weight": random(40, 40, seed=n) for n in range(4)}
    change = {name: 0.01 * random(40, 40, seed=9 + n) for n, name in enumerate(base)}

    def found(parts: int, strength: float = 1.0) -> Connectivity:
        """`parts` of the four matrices have their rows in another order; the tune is that much stronger in them."""
        other = {name: t[torch.randperm(40)] if n < parts else t for n, (name, t) in enumerate(base.items())}
        tuned = {name: t + (strength if n < parts else 1.0) * change[name] for n, (name, t) in enumerate(base.items())}
        return wl.connectivity(base, tuned, other)

    assert [found(n).forecast for n in (0, 1, 3, 4)] == ["near", "far", "unrelated", "unrelated"]
    assert found(1).lost == pytest.approx(0.25, abs=0.02) and "unrelated where 2" in found(1).words
    mostly = found(1, strength=4.0)  # the bases are alike as a whole, but not where the tune is
    assert mostly.whole.cosine > 0.7 and mostly.lost > 0.8 and mostly.forecast == "unrelated"
    assert "of the tune is" in mostly.words and "cosine" in found(4).words
    assert found(1, strength=0.01).forecast == "far"  # by the distance


def test_real_networks_know_their_own_base(torchani_pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = torchani_pairs[0]
    assert wl.connectivity(base, tuned, base).forecast == "near"
    for other, _ in torchani_pairs[1:]:
        found = wl.connectivity(base, tuned, other)
        assert found.forecast == "unrelated" and abs(found.whole.cosine) < 0.1
    done = wl.transfer(base, tuned, torchani_pairs[1][0], tmp_path / "other.safetensors")
    assert done.forecast is not None and "will not work" in done.forecast.words
    for index, (own, theirs) in enumerate(torchani_pairs):  # each one's change on its own base
        wl.transfer(own, theirs, own, tmp_path / f"{index}.safetensors", forecast=False)
        made, meant = load_file(tmp_path / f"{index}.safetensors"), load_file(theirs)
        assert all(torch.allclose(made[n], t, rtol=1e-6, atol=1e-7) for n, t in meant.items())
        wl.diff(own, theirs, tmp_path / f"exact{index}.safetensors")
        wl.apply(own, tmp_path / f"exact{index}.safetensors", out=tmp_path / f"exactly{index}.safetensors")
        exactly = load_file(tmp_path / f"exactly{index}.safetensors")
        assert all(torch.equal(exactly[n], t) for n, t in meant.items())


def test_other_architectures_are_refused() -> None:
    base = {"layers.0.weight": torch.ones(3, 3)}
    with pytest.raises(NamesMismatchError, match=r"layers\.0\.weight"):
        wl.connectivity(base, base, {"layers.0.weight": torch.ones(3, 4)})
    with pytest.raises(NamesMismatchError, match="not in all three"):
        wl.connectivity(base, base, {"other": torch.ones(3, 3)})
