"""PEFT adapters: their configuration and their tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_json, of_safetensors, of_zip
from tests.fuzz.samples_models import save_model

READERS = {
    "import": lambda d: wl.lora_import(d / "adapter", d / "made.safetensors", base=d / "base"),
    "apply": lambda d: wl.apply(d / "base", d / "adapter", out=d / "out"),
    "apply in place": lambda d: wl.apply(d / "base", d / "adapter", in_place=True),
    "inspect": lambda d: wl.inspect(d / "adapter", base=d / "base"),
}
_SPOILED = {"adapter/adapter_config.json": of_json, "adapter/adapter_model.safetensors": of_safetensors}
_ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
_EMBEDDING = "base_model.model.model.embed_tokens"


def _tensors() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    return {
        f"{_ATTENTION}.lora_A.weight": torch.randn(2, 8, generator=made),
        f"{_ATTENTION}.lora_B.weight": torch.randn(8, 2, generator=made),
    }


def _save(folder: Path, tensors: dict[str, Tensor], pickled: bool = False, **config: object) -> None:
    save_model(folder / "base", 1)
    place = folder / "adapter"
    place.mkdir()
    common = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    common["fan_in_fan_out"] = False  # q_proj is square
    (place / "adapter_config.json").write_text(json.dumps(common | config))
    if pickled:
        torch.save(tensors, place / "adapter_model.bin")
    else:
        save_file(tensors, place / "adapter_model.safetensors")


@kind("LoRA", _SPOILED, READERS, share=6)
def _lora(folder: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^.*q_proj": 3}}
    _save(folder, _tensors(), use_rslora=True, base_model_name_or_path="org/base", revision=None, **patterns)


@kind("DoRA", _SPOILED, READERS, share=3)
def _dora(folder: Path) -> None:
    _save(folder, _tensors() | {f"{_ATTENTION}.lora_magnitude_vector": torch.rand(8)}, use_dora=True)


@kind("trained tokens", _SPOILED, READERS, share=3)
def _tokens(folder: Path) -> None:
    tensors = _tensors() | {f"{_EMBEDDING}.token_adapter.trainable_tokens_delta": torch.randn(2, 8)}
    _save(folder, tensors, trainable_token_indices={"embed_tokens": [1, 3]})


@kind("LoRA of an embedding", _SPOILED, READERS, share=3)
def _embedding(folder: Path) -> None:
    pair = {f"{_EMBEDDING}.lora_embedding_A": torch.randn(2, 8), f"{_EMBEDDING}.lora_embedding_B": torch.randn(8, 2)}
    _save(folder, pair, target_modules=["embed_tokens"])


@kind("saved modules", _SPOILED, READERS, share=2)
def _saved(folder: Path) -> None:
    tensors = _tensors() | {f"{_EMBEDDING}.weight": torch.randn(8, 8)}
    _save(folder, tensors, modules_to_save=["embed_tokens"])


@kind("LoRA, pickled", {"adapter/adapter_model.bin": of_zip}, READERS, share=3)
def _pickled(folder: Path) -> None:
    _save(folder, _tensors(), pickled=True)
