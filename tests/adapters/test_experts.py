"""LoRA on stacked experts: how `lora_B` is packed, as peft has it (rank by rank) and as Unsloth had it (by expert)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import MalformedFileError, UsageError

EXPERTS, RANK, OUT, IN = 3, 2, 6, 4
KEY = "base_model.model.mlp.experts.lora_"
NAME = "mlp.experts.down_proj"


def factors() -> tuple[Tensor, Tensor]:
    """A [experts, rank, in] and B [experts, out, rank]."""
    torch.manual_seed(0)
    return torch.randn(EXPERTS, RANK, IN), torch.randn(EXPERTS, OUT, RANK)


def adapter(folder: Path, *, by_expert: bool, card: str = "", **config: Any) -> Path:
    folder.mkdir()
    down, up = factors()
    packed = up.permute(1, 0, 2) if by_expert else up.permute(1, 2, 0)
    tensors = {f"{KEY}A.weight": down.reshape(-1, IN), f"{KEY}B.weight": packed.reshape(OUT, -1).contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_parameters": [NAME], "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def base() -> dict[str, Tensor]:
    return {NAME: torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(1))}


def expected() -> Tensor:
    down, up = factors()
    return base()[NAME] + 2 * torch.stack([up[i] @ down[i] for i in range(EXPERTS)])


LAYOUTS: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"lora_B_layout": "rank_major"}),
    (True, {"lora_B_layout": "grouped_by_expert"}),
    (True, {"unsloth_fused_expert_lora": {"parameters": {"down_proj": {"lora_B_layout": "grouped_by_expert"}}}}),
]


@pytest.mark.parametrize(("by_expert", "config"), LAYOUTS)
def test_both_packings_give_the_same_model(tmp_path: Path, by_expert: bool, config: dict[str, Any]) -> None:
    found = wl.apply(base(), adapter(tmp_path / "a", by_expert=by_expert, **config))
    assert torch.allclose(found[NAME], expected(), rtol=0, atol=1e-6 * float(expected().abs().max()))


MARKS: list[dict[str, Any]] = [
    {"card": "---\ntags:\n- Unsloth\n---\n"},
    {"unsloth_fixed": True},
    {"auto_mapping": {"parent_library": "unsloth.models.llama"}},
    {"base_model_name_or_path": "unsloth/some-moe"},
]


@pytest.mark.parametrize("marks", MARKS)
def test_where_unsloth_made_it_and_it_does_not_say_how_it_is_asked(tmp_path: Path, marks: dict[str, Any]) -> None:
    folder = adapter(tmp_path / "a", by_expert=True, **marks)
    with pytest.raises(UsageError, match="Unsloth") as caught:
        wl.apply(base(), folder)
    assert "--experts-layout unsloth" in caught.value.remedy and "--experts-layout peft" in caught.value.remedy
    found = wl.apply(base(), folder, experts_layout="unsloth")
    assert torch.allclose(found[NAME], expected(), rtol=0, atol=1e-6 * float(expected().abs().max()))
    other = adapter(tmp_path / "b", by_expert=False, **marks)
    found = wl.apply(base(), other, experts_layout="peft")
    assert torch.allclose(found[NAME], expected(), rtol=0, atol=1e-6 * float(expected().abs().max()))


def test_a_layout_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="lora_B_layout"):
        wl.apply(base(), adapter(tmp_path / "a", by_expert=True, lora_B_layout="spiral"))


def test_peft_merges_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is an extra")
    network = nn.Module()
    network.mlp = nn.Module()
    network.mlp.experts = nn.Module()
    network.mlp.experts.down_proj = nn.Parameter(base()[NAME].clone())
    folder = adapter(tmp_path / "a", by_expert=False, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = peft.PeftConfig.from_pretrained(str(folder))
        model = peft.PeftModel(network, configuration)
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        merged = model.merge_and_unload().state_dict()[NAME]
    assert torch.allclose(merged, expected(), atol=1e-6)
    assert torch.allclose(wl.apply(base(), folder)[NAME], merged, rtol=0, atol=1e-6 * float(merged.abs().max()))
