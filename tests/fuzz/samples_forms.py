"""Adapters that are no PEFT folders: kohya's, LyCORIS', those of diffusers, mlx-lm, torchtune and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_bytes, of_json, of_safetensors, of_zip
from tests.fuzz.samples_models import save_model

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
READERS = {
    "import": lambda d: wl.lora_import(_operand(d), d / "made.safetensors", base=d / "base"),
    "apply": lambda d: wl.apply(d / "base", _operand(d), out=d / "out"),
    "inspect": lambda d: wl.inspect(_operand(d), base=d / "base"),
    "compare": lambda d: wl.compare([_operand(d), _operand(d)], base=d / "base"),
}
_FILE = {"adapter/*.safetensors": of_safetensors}
_CONFIGURED = {**_FILE, "adapter/adapter_config.json": of_json}


def _operand(folder: Path) -> Path:
    """The adapter's one file, or its folder where a configuration lies beside it."""
    files = list((folder / "adapter").iterdir())
    return files[0] if len(files) == 1 else folder / "adapter"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _save(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "style.safetensors"
) -> None:
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter" / name, metadata)


def _configure(folder: Path, **config: object) -> None:
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _unet(folder: Path) -> str:
    """A part of a UNet; gives the name that kohya has for its module."""
    (folder / "base").mkdir()
    tensors = {f"{UNET}.weight": random(12, 8), f"{UNET}.bias": random(12)}
    save_file(tensors, folder / "base" / "diffusion_pytorch_model.safetensors")
    return f"lora_unet_{UNET.replace('.', '_')}"


@kind("kohya", _FILE, READERS)
def _kohya(folder: Path) -> None:
    name = _unet(folder)
    parts = {"lora_up.weight": random(12, 2), "lora_down.weight": random(2, 8), "alpha": torch.tensor(1.0)}
    told = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1"}
    _save(folder, {f"{name}.{part}": tensor for part, tensor in parts.items()}, told)


@kind("LoHa of LyCORIS", _FILE, READERS, share=2)
def _loha(folder: Path) -> None:
    name = _unet(folder)
    shapes = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 8)}
    _save(folder, {f"{name}.{part}": random(*shape) for part, shape in shapes.items()} | {f"{name}.alpha": random(1)})


@kind("LoKr of LyCORIS", _FILE, READERS, share=2)
def _lokr(folder: Path) -> None:
    name = _unet(folder)
    shapes = {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
    tensors = {f"{name}.{part}": random(*shape) for part, shape in shapes.items()}
    _save(folder, tensors | {f"{name}.alpha": torch.tensor(1.0)})


@kind("LoRA of diffusers", _FILE, READERS)
def _diffusers(folder: Path) -> None:
    _unet(folder)
    told = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {UNET: 2}}
    tensors = {f"unet.{UNET}.lora_A.weight": random(2, 8), f"unet.{UNET}.lora_B.weight": random(12, 2)}
    _save(folder, tensors, {"lora_adapter_metadata": json.dumps(told)})


@kind("LoRA of mlx-lm", _CONFIGURED, READERS)
def _mlx(folder: Path) -> None:
    save_model(folder / "base", 1, config=True)
    tensors = {f"{Q}.lora_a": random(8, 2), f"{Q}.lora_b": random(2, 8), f"{UP}.lora_a": random(8, 2)}
    _save(folder, tensors | {f"{UP}.lora_b": random(2, 12), f"{UP}.m": random(12)}, name="adapters.safetensors")
    scale = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    _configure(folder, fine_tune_type="dora", lora_parameters=scale, model="org/model", num_layers=1)


@kind("LoRA of torchtune", {"adapter/adapter_0.pt": of_zip, "adapter/adapter_config.json": of_json}, READERS)
def _torchtune(folder: Path) -> None:
    save_model(folder / "base", 1, config=True)
    _configure(folder, r=2, lora_alpha=4, target_modules=["q_proj"], peft_type="LORA")
    name = "layers.0.attn.q_proj"
    tensors = {f"{name}.lora_a.weight": random(2, 8), f"{name}.lora_b.weight": random(8, 2)}
    torch.save(tensors, folder / "adapter" / "adapter_0.pt")


@kind("GGUF adapter", {"adapter/lora.gguf": of_bytes}, READERS)
def _gguf(folder: Path) -> None:
    import gguf

    save_model(folder / "base", 1, config=True)
    (folder / "adapter").mkdir()
    writer = gguf.GGUFWriter(folder / "adapter" / "lora.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", random(2, 8).numpy())
    writer.add_tensor("blk.0.attn_q.weight.lora_b", random(8, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@kind("PEFT in one file", _FILE, READERS)
def _one_file(folder: Path) -> None:
    save_model(folder / "base", 1, config=True)
    keys = {f"base_model.model.{UP}.lora_A.default.weight": random(2, 8)}
    keys |= {f"base_model.model.{UP}.lora_B.default.weight": random(12, 2)}
    _save(folder, keys, {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 4})})
