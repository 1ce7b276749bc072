"""Several fine-tunes as one model, without a patch in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from tests.ops.test_transfer import model, shards
from weightlab.errors import NamesMismatchError, NonFiniteError, UsageError

State = dict[str, Tensor]


def save(folder: Path, state: State) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and three tunes of it, in bf16, the last of which has shards and is in fp32."""
    base = model(tmp_path / "base", 0, dtype=torch.bfloat16)
    made = [base]
    for seed in (1, 2, 3):
        state = load_file(base / "model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if seed == 3 else torch.bfloat16
        tuned = {n: (t + 0.05 * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in state.items()}
        made.append(save(tmp_path / f"tuned{seed}", tuned))
    shards(made[-1], 3)
    return made


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": [0.2, 0.5, 0.8]}),
        ("ties", {"density": 0.3, "scope": "model", "lambda": 0.5}),
    ],
)
def test_equals_patches_that_are_composed(
    models: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    base, *tuned = models
    wl.merge(base, tuned, tmp_path / "out", method=method, weights=[1.0, 0.5, 0.7], parameters=parameters)
    parts = [wl.diff(base, t, encode="dense:fp32") * w for t, w in zip(tuned, (1.0, 0.5, 0.7), strict=True)]
    wl.apply(base, wl.compose(parts, method=method, parameters=parameters), out=tmp_path / "apart")
    found, meant = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "apart"))
    assert found.keys() == meant.keys()
    for name, tensor in found.items():  # the order of the sum is another
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), meant[name].float(), rtol=2**-7, atol=1e-6)
        assert float((tensor != meant[name]).float().mean()) < 0.01
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_formula_rounded_once(models: list[Path], tmp_path: Path) -> None:
    base, one, two, _ = models
    wl.merge(base, [one, two], tmp_path / "out", weights=[0.5, 0.25])
    found, start, first, second = (load_file(m / "model.safetensors") for m in (tmp_path / "out", base, one, two))
    for name, tensor in found.items():
        b, f, s = (state[name].double() for state in (start, first, second))
        meant = b + 0.5 * (f - b) + 0.25 * (s - b)
        assert torch.equal(tensor, meant.to(torch.bfloat16)), name


def test_order_does_not_matter(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    options: dict[str, Any] = {"method": "dare_ties"}
    wl.merge(base, tuned, tmp_path / "one", weights=[1, 2, 3], parameters={"density": [0.1, 0.5, 0.9]}, **options)
    tuned.reverse()
    wl.merge(base, tuned, tmp_path / "two", weights=[3, 2, 1], parameters={"density": [0.9, 0.5, 0.1]}, **options)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_integers_stay_and_misfits_are_listed(tmp_path: Path) -> None:
    start = {"w": torch.ones(3, 2), "steps": torch.tensor([5])}
    base = save(tmp_path / "base", start)
    tuned = save(tmp_path / "tuned", {"w": torch.ones(3, 2) * 2, "steps": torch.tensor([9])})
    wl.merge(base, [tuned], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["steps"].item() == 5 and found["w"].tolist() == [[2.0, 2.0]] * 3
    other = save(tmp_path / "other", {"w": torch.ones(3, 2), "more": torch.ones(1)})
    with pytest.raises(NamesMismatchError) as error:
        wl.merge(base, [tuned, other], tmp_path / "out2")
    assert {text.split(":")[0].split(" ")[0] for text in error.value.offenders} == {"more", "steps"}
    narrow = save(tmp_path / "narrow", {**start, "w": torch.ones(2, 2)})
    with pytest.raises(NamesMismatchError, match="other shapes"):
        wl.merge(base, [tuned, narrow], tmp_path / "out2")
    broken = save(tmp_path / "broken", {**start, "w": torch.full((3, 2), torch.nan)})
    with pytest.raises(NonFiniteError):
        wl.merge(base, [tuned, broken], tmp_path / "out2", method="ties", parameters={"density": 0.5})
    with pytest.raises(UsageError, match="nothing to merge"):
        wl.merge(base, [], tmp_path / "out2")
    with pytest.raises(UsageError, match="2 weights for 1"):
        wl.merge(base, [tuned], tmp_path / "out2", weights=[1, 2])
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("density", [1.0, 0.7])
def test_infinities_that_are_let_through(tmp_path: Path, density: float) -> None:
    """Two of other signs have no majority, whatever sign a machine gives to what is no number."""
    base = save(tmp_path / "base", {"w": torch.zeros(3)})
    one = save(tmp_path / "one", {"w": torch.tensor([torch.inf, 1.0, 2.0])})
    two = save(tmp_path / "two", {"w": torch.tensor([-torch.inf, torch.inf, -1.0])})
    options: dict[str, Any] = {"method": "ties", "parameters": {"density": density}}
    with pytest.raises(NonFiniteError):
        wl.merge(base, [one, two], tmp_path / "out", **options)
    wl.merge(base, [one, two], tmp_path / "out", allow_nonfinite=True, **options)
    assert str(load_file(tmp_path / "out" / "model.safetensors")["w"].tolist()) == "[nan, inf, 2.0]"
