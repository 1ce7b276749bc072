"""Models as safetensors: one file, shards with an index, and a folder with a network's configuration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_json, of_safetensors

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}


def state(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of that Llama, without a head; integers and half precision are there too."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.up_proj": (12, 8)}
    tensors = {f"model.layers.0.{name}.weight": torch.randn(shape, generator=made) for name, shape in shapes.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(8, 8, generator=made)
    tensors["model.norm.weight"] = torch.randn(8, generator=made).to(torch.bfloat16)
    tensors["steps"] = torch.tensor([7])
    return tensors


def save_model(folder: Path, seed: int = 0, config: bool = False) -> Path:
    folder.mkdir()
    save_file(state(seed), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def save_shards(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    tensors = state(seed)
    weight_map: dict[str, str] = {}
    for n in range(2):
        file = f"model-{n + 1:05d}-of-00002.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[n::2]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


READERS = {
    "diff": lambda d: wl.diff(d / "base", d / "model", d / "made.safetensors", encode="dense"),
    "diff from": lambda d: wl.diff(d / "model", d / "base"),
    "apply": lambda d: wl.apply(d / "model", d / "patch.safetensors", out=d / "out"),
    "apply in place": lambda d: wl.apply(d / "model", d / "patch.safetensors", in_place=True),
    "status": lambda d: wl.status(d / "model"),
    "verify": lambda d: wl.verify(d / "model"),
    "inspect": lambda d: wl.inspect(d / "model"),
    "compare": lambda d: wl.compare([d / "model", d / "base"], base=d / "base"),
    "merge": lambda d: wl.merge(d / "base", [d / "model", d / "base"], d / "out"),
}


def _beside(folder: Path) -> None:
    """A base that the model was tuned from, and a patch that fits it."""
    base = save_model(folder / "base", 1)
    wl.diff(base, state(2), folder / "patch.safetensors", encode="dense")


@kind("safetensors", {"model/model.safetensors": of_safetensors}, READERS, share=12)
def _file(folder: Path) -> None:
    _beside(folder)
    save_model(folder / "model")


@kind("index", {"model/*.index.json": of_json, "model/*-of-00002.safetensors": of_safetensors}, READERS, share=8)
def _index(folder: Path) -> None:
    _beside(folder)
    save_shards(folder / "model")


@kind(
    "config.json",
    {"model/config.json": of_json},
    {
        "diff": READERS["diff"],
        "inspect": READERS["inspect"],
        "apply": READERS["apply"],
        "transfer": lambda d: wl.transfer(d / "base", d / "base", d / "model", d / "out"),
        "transfer from": lambda d: wl.transfer(d / "model", d / "model", d / "base", d / "out"),
    },
    share=4,
)
def _config(folder: Path) -> None:
    _beside(folder)
    (folder / "base" / "config.json").write_text(json.dumps(LLAMA))
    save_model(folder / "model", config=True)
