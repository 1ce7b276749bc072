"""Which way a weight lies without a network: the shape tells, then fan_in_fan_out where others agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import NamesMismatchError, UsageError

SQUARE, WIDE, TALL = (6, 6), (4, 6), (6, 4)


def adapter(folder: Path, modules: dict[str, tuple[int, int]], **config: Any) -> dict[str, Tensor]:
    """An adapter of rank 2 on modules of [outputs, inputs]; returns their B·A."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    for module, (outputs, inputs) in modules.items():
        down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
        tensors |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
        products[module] = up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
    return products


def test_shapes_tell_whatever_the_flag_says(tmp_path: Path) -> None:
    for flag in (True, False):
        found = adapter(tmp_path / str(flag), {"one": WIDE, "other": WIDE}, fan_in_fan_out=flag)
        base = {"one.weight": torch.zeros(4, 6), "other.weight": torch.zeros(6, 4)}
        result = wl.apply(base, tmp_path / str(flag))
        assert torch.allclose(result["one.weight"], found["one"], atol=1e-6)
        assert torch.allclose(result["other.weight"], found["other"].T, atol=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_one_lies_as_the_flag_says_where_others_agree(tmp_path: Path, flag: bool) -> None:
    found = adapter(tmp_path / "a", {"one": WIDE, "square": SQUARE}, fan_in_fan_out=flag)
    base = {"one.weight": torch.zeros(*(TALL if flag else WIDE)), "square.weight": torch.zeros(6, 6)}
    result = wl.apply(base, tmp_path / "a")
    assert torch.allclose(result["square.weight"], found["square"].T if flag else found["square"], atol=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_with_the_flag_alone_it_tells(tmp_path: Path, flag: bool) -> None:
    found = adapter(tmp_path / "a", {"square": SQUARE}, fan_in_fan_out=flag)
    result = wl.apply({"square.weight": torch.zeros(6, 6)}, tmp_path / "a")
    assert torch.allclose(result["square.weight"], found["square"].T if flag else found["square"], atol=1e-6)


def test_where_others_lie_the_other_way_it_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "a", {"one": WIDE, "square": SQUARE}, fan_in_fan_out=False)
    base = {"one.weight": torch.zeros(6, 4), "square.weight": torch.zeros(6, 6)}
    with pytest.raises(UsageError, match="fan_in_fan_out is false, and others lie the other way") as caught:
        wl.apply(base, tmp_path / "a")
    assert caught.value.offenders == ("square [6, 6]", "one [6, 4]: lies [in, out]")
    assert "config.json" in caught.value.remedy


def test_where_nothing_tells_it_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path / "a", {"square": SQUARE})
    with pytest.raises(UsageError, match=r"not in adapter_config\.json"):
        wl.apply({"square.weight": torch.zeros(6, 6)}, tmp_path / "a")


def test_names_of_gpt2_are_doubted(tmp_path: Path) -> None:
    """peft leaves the flag false where the last module that it visited is a Linear."""
    adapter(tmp_path / "a", {"h.0.attn.c_proj": SQUARE, "lm_head": WIDE}, fan_in_fan_out=False)
    base = {"h.0.attn.c_proj.weight": torch.zeros(6, 6), "lm_head.weight": torch.zeros(4, 6)}
    with pytest.raises(UsageError, match="square") as caught:
        wl.apply(base, tmp_path / "a")
    assert caught.value.offenders == ("h.0.attn.c_proj [6, 6]: as in GPT-2",)


def test_a_shape_that_is_neither_is_listed(tmp_path: Path) -> None:
    adapter(tmp_path / "a", {"one": WIDE}, fan_in_fan_out=False)
    with pytest.raises(NamesMismatchError, match=r"one.weight \[5, 6\]: its factors make \[4, 6\]"):
        wl.apply({"one.weight": torch.zeros(5, 6)}, tmp_path / "a")
