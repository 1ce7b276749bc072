"""Adapters whose names differ from the model's by one renaming: told with the option to pass, and inferred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from weightlab_cli.main import run

import weightlab as wl
from weightlab.errors import NamesMismatchError, UsageError

QUERY, WIDE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MAP = "--map model.language_model.=model."


def model(folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    tensors = {
        f"{QUERY}.weight": torch.ones(4, 4),
        f"{WIDE}.weight": torch.ones(4, 6),
        "lm_head.weight": torch.ones(5, 4),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


def adapter(folder: Path, *, turned: bool = False) -> Path:
    """On names of a vision-language model; each product is 2 · 3 everywhere."""
    folder.mkdir()
    sizes = {QUERY: (4, 4), WIDE: (6, 4) if turned else (4, 6)}
    factors: dict[str, Tensor] = {}
    for module, (outputs, inputs) in sizes.items():
        name = "base_model.model." + module.replace("model.", "model.language_model.", 1)
        factors[f"{name}.lora_A.weight"] = torch.ones(1, inputs)
        factors[f"{name}.lora_B.weight"] = torch.full((outputs, 1), 3.0)
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "fan_in_fan_out": turned}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def is_right(found: dict[str, Tensor], clean: dict[str, Tensor]) -> None:
    assert torch.equal(found[f"{QUERY}.weight"], torch.full((4, 4), 7.0))
    assert torch.equal(found[f"{WIDE}.weight"], torch.full((4, 6), 7.0))
    assert torch.equal(found["lm_head.weight"], clean["lm_head.weight"])


def test_the_error_gives_the_option(tmp_path: Path) -> None:
    model(tmp_path / "base")
    with pytest.raises(NamesMismatchError) as caught:
        wl.apply(tmp_path / "base", adapter(tmp_path / "a"), out=tmp_path / "out")
    assert MAP in caught.value.remedy and not (tmp_path / "out").exists()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("option", ["auto", MAP.split()[1]])
def test_the_option_works(tmp_path: Path, option: str, turned: bool) -> None:
    clean = model(tmp_path / "base")
    folder = adapter(tmp_path / "a", turned=turned)
    assert run(["apply", str(tmp_path / "base"), str(folder), "-o", str(tmp_path / "out"), "--map", option]) == 0
    is_right(load_file(tmp_path / "out" / "model.safetensors"), clean)


def test_in_place_and_taken_off_again(tmp_path: Path) -> None:
    clean = model(tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    folder = adapter(tmp_path / "a")
    wl.apply(tmp_path / "base", folder, in_place=True, renames="auto")
    is_right(load_file(tmp_path / "base" / "model.safetensors"), clean)
    wl.remove(tmp_path / "base", folder)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_imported(tmp_path: Path) -> None:
    clean = model(tmp_path / "base")
    folder, out = adapter(tmp_path / "a"), tmp_path / "p.safetensors"
    assert run(["lora", "import", str(folder), str(tmp_path / "base"), "-o", str(out), "--map", "auto"]) == 0
    is_right(wl.apply(clean, str(out)), clean)
    with pytest.raises(UsageError, match="needs the model's names"):
        wl.lora_import(folder, tmp_path / "q.safetensors", renames="auto")


def test_names_of_another_network_get_no_option(tmp_path: Path) -> None:
    save_file({"encoder.0.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(NamesMismatchError) as caught:
        wl.apply(tmp_path / "base.safetensors", adapter(tmp_path / "a"), out=tmp_path / "out.safetensors")
    assert "--map" not in caught.value.remedy
    with pytest.raises(NamesMismatchError, match="finds no renaming"):
        wl.apply(tmp_path / "base.safetensors", tmp_path / "a", out=tmp_path / "out.safetensors", renames="auto")
