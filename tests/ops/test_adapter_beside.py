"""A whole model whose folder also holds an adapter: a model where models are named, and never taken for the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MissingInputError, UsageError

NAME = "layers.0.q_proj.weight"


def model(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({NAME: torch.full((4, 4), value), "norm": torch.full((4,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def with_adapter(folder: Path) -> Path:
    key = f"base_model.model.{NAME.removesuffix('.weight')}.lora_"
    save_file(
        {f"{key}A.weight": torch.ones(1, 4), f"{key}B.weight": torch.ones(4, 1)}, folder / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def weight(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")[NAME]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return model(tmp_path / "base", 1.0), with_adapter(model(tmp_path / "tuned", 3.0))


def test_its_difference_is_that_of_the_full_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned)
    assert "adapter" in (patch.header.notes or "")
    wl.apply(base, patch, out=tmp_path / "out")
    assert torch.equal(weight(tmp_path / "out"), torch.full((4, 4), 3.0))
    assert wl.inspect(tuned).kind == "checkpoint" and any("adapter" in note for note in wl.inspect(tuned).notes)
    for index, done in enumerate(
        (wl.merge(base, [tuned], tmp_path / "0"), wl.transfer(base, tuned, base, tmp_path / "1", rows="by-id"))
    ):
        assert torch.equal(weight(tmp_path / str(index)), torch.full((4, 4), 3.0))
        assert any("adapter" in note for note in done.notes)


def test_a_new_checkpoint_of_it_has_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    done = wl.apply(tuned, 0.5 * wl.diff(tuned, base, encode="dense"), out=tmp_path / "out")
    assert torch.equal(weight(tmp_path / "out"), torch.full((4, 4), 2.0))
    assert sorted(done.left_out) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_as_a_patch_it_is_ambiguous(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(UsageError, match="a whole model and an adapter"):
        wl.apply(base, tuned, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tuned / "model.safetensors").unlink()  # now it is the adapter
    wl.apply(base, tuned, out=tmp_path / "out")
    assert torch.equal(weight(tmp_path / "out"), torch.full((4, 4), 2.0))


def test_an_adapter_is_no_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, tuned = pair
    (tuned / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match="holds an adapter, and no model") as failed:
        wl.apply(tuned, out=tmp_path / "out")
    assert "weightlab apply BASE" in failed.value.remedy
