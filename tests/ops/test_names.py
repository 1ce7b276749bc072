"""Models whose names differ by a renaming: told, inferred, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import NamesMismatchError
from weightlab.ops.compare import difference

Tensors = dict[str, Tensor]


def text(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed.weight", *(f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("up", "down"))]
    return {n: torch.randn(3 + i, 4, generator=generator) for i, n in enumerate([*names, "lm_head.weight"])}


def before(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + n: t for n, t in tensors.items()}


def plus(tensors: Tensors, amount: float = 1.0) -> Tensors:
    return {n: t + amount for n, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "base_model.model.", "bert."])
def test_the_error_gives_the_option_and_auto_takes_it(prefix: str) -> None:
    base, tuned = text(), before(prefix, plus(text()))
    with pytest.raises(NamesMismatchError, match=f"--map {prefix}=") as caught:
        wl.diff(base, tuned)
    assert caught.value.offenders == ()
    with pytest.raises(NamesMismatchError, match=f"--map ={prefix}"):
        wl.diff(tuned, base)
    patch = wl.diff(base, tuned, renames="auto")
    assert patch.header.notes is not None and f"--map {prefix}=" in patch.header.notes
    result = wl.apply(base, patch)
    assert all(torch.equal(result[n], base[n] + 1) for n in base)
    assert difference(base, tuned, renames="auto").facts["renames"] == {prefix: ""}


def test_a_renaming_is_not_hidden_by_what_is_allowed() -> None:
    with pytest.raises(NamesMismatchError, match=r"--map module.="):
        wl.diff(text(), before("module.", plus(text())), allow=["added", "removed"])
    base, tuned = text() | {"score.weight": torch.ones(2, 2)}, text() | {"classifier.weight": torch.zeros(2, 2)}
    patch = wl.diff(base, tuned, allow=["added", "removed"])  # a new head beside an old one is meant
    assert set(patch.records) == {"score.weight", "classifier.weight"}


def test_gamma_and_beta_are_weight_and_bias() -> None:
    old = {"bert.LayerNorm.gamma": torch.ones(3), "bert.LayerNorm.beta": torch.zeros(3), "cls.weight": torch.ones(2, 2)}
    new = {
        "bert.LayerNorm.weight": torch.full((3,), 2.0),
        "bert.LayerNorm.bias": torch.full((3,), 3.0),
        "classifier.weight": torch.ones(4, 2),
    }
    patch = wl.diff(old, new, allow=["added", "removed"])
    result = wl.apply(old, patch)
    assert result.keys() == {"bert.LayerNorm.gamma", "bert.LayerNorm.beta", "classifier.weight"}
    assert torch.equal(result["bert.LayerNorm.gamma"], new["bert.LayerNorm.weight"])
    assert torch.equal(result["bert.LayerNorm.beta"], new["bert.LayerNorm.bias"])


def test_what_is_left_out_is_not_compared() -> None:
    base = text() | {"old.weight": torch.ones(2), "shape.weight": torch.ones(2)}
    tuned = plus(text()) | {"new.weight": torch.ones(5), "shape.weight": torch.ones(3)}
    assert set(wl.diff(base, tuned, include=["model.*"]).records) == {n for n in text() if n.startswith("model.")}
    left = wl.diff(base, tuned, exclude=["old.*", "new.*", "shape.*"])
    assert set(left.records) == set(text())
    assert difference(base, tuned, include=["model.*"]).facts["compared"] == 5


def test_a_chat_vector_goes_on_the_language_tower_only(tmp_path: Path) -> None:
    vlm = before("language_model.", text()) | {"vision.patch.weight": torch.ones(8, 8)}
    for name, tensors in (("base", text()), ("tuned", plus(text())), ("vlm", vlm)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    patch = wl.diff(tmp_path / "base", tmp_path / "tuned", encode="dense")
    with pytest.raises(NamesMismatchError, match=r"--map =language_model."):
        wl.apply(tmp_path / "vlm", patch, out=tmp_path / "out")
    wl.apply(tmp_path / "vlm", patch, out=tmp_path / "out", renames="auto")
    models = (tmp_path / "base", tmp_path / "tuned", tmp_path / "vlm")
    with pytest.raises(NamesMismatchError, match=r"--map language_model.="):
        wl.transfer(*models, tmp_path / "moved", forecast=False)
    assert wl.transfer(*models, tmp_path / "moved", renames="auto").forecast is not None
    for out in ("out", "moved"):
        result = load_file(tmp_path / out / "model.safetensors")
        assert result.keys() == vlm.keys()
        for name, tensor in vlm.items():
            expected = tensor if name.startswith("vision") else tensor + 1
            assert torch.allclose(result[name], expected, atol=1e-6), name


def test_a_stack_records_what_auto_took(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file(before("module.", text()), tmp_path / "m" / "model.safetensors")
    clean = (tmp_path / "m" / "model.safetensors").read_bytes()
    patch = wl.diff(text(), plus(text()), encode="dense")
    wl.apply(tmp_path / "m", patch, in_place=True, renames="auto")
    assert '"renames":{"":"module."}' in (
        next((tmp_path / "m" / ".weightlab").rglob("stack.json"))
    ).read_text().replace(" ", "")
    wl.remove(tmp_path / "m", patch)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == clean
