"""Adapters that cannot be computed here, or do not fit: one error that names it all, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.adapters.changes import Stacked
from weightlab.errors import (
    MalformedFileError,
    MisfitError,
    MissingInputError,
    NamesMismatchError,
    NonFiniteError,
    UnsupportedFormatError,
    UsageError,
)

A, B = torch.randn(2, 6), torch.randn(4, 2)


def adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter of rank 2 on `layer` [4, 6], with these options."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    factors = {"layer.lora_A.weight": A, "layer.lora_B.weight": B} if tensors is None else tensors
    save_file({f"base_model.model.{n}": t for n, t in factors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file({"layer.weight": torch.randn(4, 6), "layer.bias": torch.randn(4)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def refused(base: Path, folder: Path, error: type[Exception], *words: str) -> None:
    before = sorted(base.parent.iterdir())
    with pytest.raises(error) as caught:
        wl.apply(base, folder, out=base.parent / "out.safetensors")
    assert all(word in str(caught.value) for word in words), caught.value
    assert sorted(base.parent.iterdir()) == before


def test_without_transformers_names_are_the_files_own(base: Path, tmp_path: Path) -> None:
    wl.apply(base, adapter(tmp_path / "adapter"), out=tmp_path / "out.safetensors")
    found, clean = load_file(tmp_path / "out.safetensors"), load_file(base)
    assert torch.allclose(found["layer.weight"], clean["layer.weight"] + 2 * (B @ A), atol=1e-6)
    assert torch.equal(found["layer.bias"], clean["layer.bias"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "BONE"}, ("BONE", "merge_and_unload")),
        ({"init_lora_weights": "pissa_niter_4"}, ("pissa",)),
        ({"use_qalora": True, "layer_replication": [[0, 4]]}, ("use_qalora", "layer_replication")),
        ({"some_day": {"x": 1}}, ("some_day",)),
    ],
)
def test_kinds_and_options_are_named(
    base: Path, tmp_path: Path, config: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(base, adapter(tmp_path / "adapter", **config), UnsupportedFormatError, *words)


def test_damaged_adapters(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {"layer.lora_A.weight": A, "other.lora_B.weight": B})
    refused(base, folder, MalformedFileError, "layer: lora_B.weight", "other: lora_A.weight")
    refused(base, adapter(folder, {"layer.lora_C.weight": A}), MalformedFileError, "lora_C")
    nan = {"layer.lora_A.weight": torch.full((2, 6), torch.nan), "layer.lora_B.weight": B}
    refused(base, adapter(folder, nan), NonFiniteError, "layer.weight")
    (folder / "adapter_model.safetensors").unlink()
    refused(base, folder, MissingInputError, "without weights")
    (folder / "adapter_config.json").write_text("{")
    refused(base, folder, MalformedFileError, "adapter_config.json")


def test_all_that_does_not_fit_is_listed(base: Path, tmp_path: Path) -> None:
    wrong = {"layer.lora_A.weight": A[:, :5], "layer.lora_B.weight": B}
    wrong |= {"head.lora_A.weight": A, "head.lora_B.weight": B, "score.weight": A}
    folder = adapter(tmp_path / "adapter", {n: t.clone() for n, t in wrong.items()})
    refused(base, folder, NamesMismatchError, "layer.weight [4, 6]", "[4, 5]", "head.weight", "score.weight")


def test_codes_of_a_quantised_base(tmp_path: Path) -> None:
    tensors = {"layer.weight": torch.zeros(4, 6, dtype=torch.int8), "layer.weight_scale": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "base.safetensors")
    refused(tmp_path / "base.safetensors", adapter(tmp_path / "adapter"), MisfitError, "layer.weight", "quantised")


def test_values_need_the_model(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", {"layer.bias": torch.ones(4)})
    with pytest.raises(UsageError, match="--base"):
        wl.inspect(folder)
    found = wl.inspect(folder, base=base)
    assert found.kind == "patch" and len(found.tensors) == 1
    assert len(wl.inspect(adapter(tmp_path / "plain")).tensors) == 1


def test_square_experts_need_the_network() -> None:
    square = Stacked(torch.zeros(6, 4), torch.zeros(4, 6), lambda rank: 1.0)
    assert "square" in square.problem((3, 4, 4)) and not square.problem((4, 4))
    assert not Stacked(torch.zeros(6, 4), torch.zeros(4, 6), lambda rank: 1.0, in_first=True).problem((3, 4, 4))


def test_an_adapter_is_compared_and_composed_like_a_patch(base: Path, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", lora_alpha=8)
    found = wl.compare([one, two])
    assert found.cosines[0][1] == pytest.approx(1) and found.norms[1] == pytest.approx(2 * found.norms[0])
    both = wl.compose([f"{one}@2", f"{two}@-1"], out=tmp_path / "both.safetensors")
    clean = {"layer.weight": torch.randn(4, 6), "layer.bias": torch.randn(4)}
    assert torch.allclose(wl.apply(clean, both)["layer.weight"], clean["layer.weight"], atol=1e-5)
    assert wl.identify(one, [tmp_path])[0].cosine == pytest.approx(1)
