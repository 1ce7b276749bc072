"""Controls: the same function in other coordinates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl

pytest.importorskip("transformers", reason="transformers is in the extra lm")

from weightlab_evals.transfer import controls

from tests.evals.transfer.machine import SMALL


@pytest.mark.parametrize("what", [("hidden", "neurons"), ("neurons",)])
@pytest.mark.parametrize("kind", SMALL)
def test_permuted_is_the_same_function(tmp_path: Path, kind: str, what: tuple[str, ...]) -> None:
    model = SMALL[kind]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    language = model.opened(tmp_path / "v1")
    first = language.load(tmp_path / "v1", train=True)
    with torch.no_grad():  # biases and norms are 0 and 1 at first, and would hide a mistake
        for parameter in first.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    second = language.load(tmp_path / "v1", train=True)
    second.load_state_dict(controls.permuted(first.state_dict(), 3, what))
    ids = torch.randint(5, 40, (4, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, two = (m(input_ids=ids).logits for m in (first.double(), second.double()))
    assert float((one - two).abs().max()) < 1e-5 * float(one.abs().max())  # norms are in fp32
    moved = [n for n, t in first.state_dict().items() if not torch.equal(t, second.state_dict()[n])]
    assert len(moved) >= (6 if what == ("neurons",) else 20)


def test_permuted_is_unrelated_to_the_forecast(tmp_path: Path) -> None:
    model = SMALL["causal"]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    for name, change in (("tuned", lambda t: t * 1.01), ("other", lambda t: t)):
        (tmp_path / name).mkdir()
        state = {n: change(t) for n, t in load_file(tmp_path / "v1" / "model.safetensors").items()}
        state = controls.permuted(state, 0) if name == "other" else state
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    assert wl.connectivity(tmp_path / "v1", tmp_path / "tuned", tmp_path / "other").forecast == "unrelated"


def test_an_unknown_tensor() -> None:
    with pytest.raises(KeyError, match="surprise"):
        controls.permuted({"surprise": torch.zeros(2)}, 0)


def test_reinitialised(tmp_path: Path) -> None:
    model = SMALL["causal"]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    first = model.opened(tmp_path / "v1").load(tmp_path / "v1")
    before = torch.random.get_rng_state()
    one, two = (controls.reinitialised(first, seed).state_dict() for seed in (1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])
    assert torch.equal(one[name], controls.reinitialised(first, 1).state_dict()[name])
