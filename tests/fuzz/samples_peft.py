"""Adapters of other kinds of PEFT than LoRA, as peft itself saves them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_json, of_safetensors
from tests.fuzz.samples_adapters import READERS
from tests.fuzz.samples_models import LLAMA

_TARGETS = {"target_modules": ["q_proj", "down_proj"]}
_PATTERNS = {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"q_proj": 3}}
KINDS: dict[str, dict[str, Any]] = {
    "ADALORA": {**_TARGETS, "total_step": 10, "init_r": 2, "target_r": 1},
    "FOURIERFT": {**_TARGETS, "n_frequency": 3},
    "HRA": {**_TARGETS, "r": 2},
    "IA3": {**_TARGETS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {**_TARGETS, **_PATTERNS, "r": 2},
    "LOKR": {**_TARGETS, **_PATTERNS, "r": 2},
    "MISS": {**_TARGETS, "r": 2},
    "OFT": {**_TARGETS, "r": 2, "oft_block_size": 0},
    "SHIRA": {**_TARGETS, "r": 1},
    "SUPERTUNING": {**_TARGETS, "sparsity": 0.9},
    "UNILORA": {**_TARGETS, "r": 2, "theta_d_length": 8, "save_indices": True},
    "VBLORA": {**_TARGETS, "num_vectors": 4, "vector_length": 4, "topk": 2, "save_only_topk_weights": True},
    "VERA": {**_TARGETS, "r": 2},
}


def _save(folder: Path, name: str) -> None:
    import peft
    import transformers

    config = transformers.LlamaConfig(**{key: LLAMA[key] for key in LLAMA if key != "torch_dtype"})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    made = peft.get_peft_model(model, peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]](**KINDS[name]))
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)


_SPOILED = {"adapter/adapter_config.json": of_json, "adapter/adapter_model.safetensors": of_safetensors}
for _name in KINDS:
    kind(f"PEFT {_name}", _SPOILED, READERS, share=1)(partial(_save, name=_name))
