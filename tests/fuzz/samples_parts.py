"""Models of several parts, in folders that a list names; models in shards of two kinds; quantised models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_json, of_safetensors
from tests.fuzz.samples_models import READERS, save_shards, state

_READERS = {name: READERS[name] for name in ("diff", "apply", "apply in place", "status", "verify", "inspect")}
_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "x"}, {"idx": 1, "name": "1", "path": "2_Dense", "type": "x"}]


def _part(folder: Path, value: float, name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"linear.weight": torch.full((2, 3), value), "linear.bias": torch.zeros(2)}, folder / name)


def _patch(folder: Path) -> None:
    wl.diff(folder / "base", folder / "tuned", folder / "patch.safetensors", encode="dense")


@kind(
    "modules.json",
    {
        "model/modules.json": of_json,
        "model/*.index.json": of_json,
        "model/2_Dense/config.json": of_json,
        "model/2_Dense/*.safetensors": of_safetensors,
    },
    _READERS,
)
def _sentences(folder: Path) -> None:
    for seed, name in enumerate(("base", "tuned", "model")):
        save_shards(folder / name, seed)
        _part(folder / name / "2_Dense", float(seed))
        (folder / name / "2_Dense" / "config.json").write_text('{"in_features": 3, "out_features": 2}')
        (folder / name / "modules.json").write_text(json.dumps(_MODULES))
    _patch(folder)


@kind(
    "model_index.json",
    {
        "model/model_index.json": of_json,
        "model/unet/config.json": of_json,
        "model/unet/*.safetensors": of_safetensors,
        "model/vae/*.index.json": of_json,
    },
    _READERS,
)
def _pipeline(folder: Path) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
    }
    for seed, name in enumerate(("base", "tuned", "model")):
        place, weights = folder / name, "diffusion_pytorch_model"
        _part(place / "unet", float(seed), f"{weights}.safetensors")
        (place / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        _part(place / "vae", -float(seed), f"{weights}-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(("linear.weight", "linear.bias"), f"{weights}-00001-of-00001.safetensors")
        told = {"metadata": {"total_size": 32}, "weight_map": weight_map}
        (place / "vae" / f"{weights}.safetensors.index.json").write_text(json.dumps(told))
        (place / "model_index.json").write_text(json.dumps(index))
    _patch(folder)


QUANTISED: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head", "self_attn"]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["self_attn"]},
}


def _quantised(folder: Path, method: str) -> None:
    for seed, name in enumerate(("base", "tuned", "model")):
        tensors = state(seed)
        codes = torch.arange(96).reshape(12, 8)
        module = "model.layers.0.mlp.up_proj"
        if method == "bitsandbytes":
            tensors |= {f"{module}.weight": codes.to(torch.int8), f"{module}.SCB": torch.ones(12)}
        else:
            scale = "weight_scale_inv" if method == "fp8" else "weight_scale"
            tensors |= {f"{module}.weight": codes.to(torch.float8_e4m3fn), f"{module}.{scale}": torch.ones(2, 1)}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        nested = {"quantization_config": QUANTISED[method]}
        config = {"model_type": "llama", "text_config": nested} if method == "fp8" else {"model_type": "llama"} | nested
        (folder / name / "config.json").write_text(json.dumps(config))
    _patch(folder)


for _method in QUANTISED:

    @kind(
        f"quantised, {_method}",
        {"model/config.json": of_json, "model/model.safetensors": of_safetensors},
        {**_READERS, "compare": READERS["compare"]},
        share=2,
    )
    def _made(folder: Path, method: str = _method) -> None:
        _quantised(folder, method)


@kind(
    "quantised beside config.json",
    {"model/quantize_config.json": of_json, "model/quant_config.json": of_json, "model/hf_quant_config.json": of_json},
    _READERS,
    share=1,
)
def _beside(folder: Path) -> None:
    _quantised(folder, "fp8")
    for name in ("base", "tuned", "model"):
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    told = {"quantize_config.json": {"bits": 4}, "quant_config.json": {"w_bit": 4}, "hf_quant_config.json": {}}
    for name, content in told.items():
        (folder / "model" / name).write_text(json.dumps(content))
