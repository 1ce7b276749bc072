"""LoRA files of diffusers, of each generation, against the formula: W + alpha / rank · up · down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from tests.adapters.forms.test_kohya import close, lora, random
from weightlab.errors import MalformedFileError, UnsupportedFormatError, UsageError

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"


def pipeline() -> dict[str, Tensor]:
    return {
        f"unet/{ATTENTION}.to_q.weight": random(12, 8),
        f"unet/{ATTENTION}.to_out.0.weight": random(12, 8),
        f"text_encoder/{TEXT}.q_proj.weight": random(12, 8),
        f"text_encoder/{TEXT}.out_proj.weight": random(12, 8),
    }


UP, DOWN = random(12, 4), random(4, 8)
DELTA = UP.double() @ DOWN.double()
GENERATIONS = {
    "attention processors": (
        f"{ATTENTION}.processor.to_q_lora.{{}}.weight",
        f"{ATTENTION}.processor.to_out_lora.{{}}.weight",
    ),
    "with the part of the pipeline": (
        f"unet.{ATTENTION}.processor.to_q_lora.{{}}.weight",
        f"text_encoder.{TEXT}.to_out_lora.{{}}.weight",
    ),
    "lora layers": (
        f"unet.{ATTENTION}.to_q.lora.{{}}.weight",
        f"text_encoder.{TEXT}.q_proj.lora_linear_layer.{{}}.weight",
    ),
    "peft": (f"unet.{ATTENTION}.to_q.{{}}.weight", f"text_encoder.{TEXT}.q_proj.{{}}.weight"),
    "peft with the adapter's name": (
        f"unet.{ATTENTION}.to_q.{{}}.default.weight",
        f"unet.{ATTENTION}.to_out.0.{{}}.default.weight",
    ),
}
WHERE = {
    "attention processors": (f"unet/{ATTENTION}.to_q.weight", f"unet/{ATTENTION}.to_out.0.weight"),
    "with the part of the pipeline": (f"unet/{ATTENTION}.to_q.weight", f"text_encoder/{TEXT}.out_proj.weight"),
    "lora layers": (f"unet/{ATTENTION}.to_q.weight", f"text_encoder/{TEXT}.q_proj.weight"),
    "peft": (f"unet/{ATTENTION}.to_q.weight", f"text_encoder/{TEXT}.q_proj.weight"),
    "peft with the adapter's name": (f"unet/{ATTENTION}.to_q.weight", f"unet/{ATTENTION}.to_out.0.weight"),
}


def keyed(generation: str, *keys: str) -> dict[str, Tensor]:
    up, down = ("lora_B", "lora_A") if generation.startswith("peft") else ("up", "down")
    return {key.format(side): t.clone() for key in keys for side, t in ((up, UP), (down, DOWN))}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation(tmp_path: Path, generation: str) -> None:
    file = lora(tmp_path, keyed(generation, *GENERATIONS[generation]), "pytorch_lora_weights.safetensors")
    for operand in (file, tmp_path):
        found = wl.apply(pipeline(), operand)
        for name, clean in pipeline().items():
            assert close(found[name], clean + DELTA if name in WHERE[generation] else clean), name


def test_alpha_of_the_header_and_of_keys(tmp_path: Path) -> None:
    keys = keyed("peft", f"unet.{ATTENTION}.to_q.{{}}.weight", f"unet.{ATTENTION}.to_out.0.{{}}.weight")
    told = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"{ATTENTION}.to_out.0": 2}}
    save_file(keys, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    found = wl.apply(pipeline(), tmp_path / "x.safetensors")
    assert close(found[f"unet/{ATTENTION}.to_q.weight"], random(12, 8) + 2 * DELTA)
    assert close(found[f"unet/{ATTENTION}.to_out.0.weight"], random(12, 8) + DELTA / 2)
    save_file(
        keys, tmp_path / "y.safetensors", {"lora_adapter_metadata": json.dumps({**told, "unet.use_rslora": True})}
    )
    found = wl.apply(pipeline(), tmp_path / "y.safetensors")
    assert close(found[f"unet/{ATTENTION}.to_q.weight"], random(12, 8) + 4 * DELTA)
    found = wl.apply(pipeline(), lora(tmp_path, {**keys, f"unet.{ATTENTION}.to_q.alpha": torch.tensor(12.0)}))
    assert close(found[f"unet/{ATTENTION}.to_q.weight"], random(12, 8) + 3 * DELTA)
    assert close(found[f"unet/{ATTENTION}.to_out.0.weight"], random(12, 8) + DELTA)


def test_a_model_of_one_part_and_dora(tmp_path: Path) -> None:
    state = {"transformer_blocks.0.attn.to_q.weight": random(12, 8), "transformer_blocks.0.attn.to_q.bias": random(12)}
    name = "transformer.transformer_blocks.0.attn.to_q"
    lengths = random(12).abs() + 0.1
    keys = {f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP, f"{name}.lora_B.bias": random(12)}
    found = wl.apply(state, lora(tmp_path, {**keys, f"{name}.lora_magnitude_vector": lengths}))
    moved = random(12, 8) + DELTA
    right = moved / moved.square().sum(1, keepdim=True).sqrt() * lengths[:, None].double()
    assert close(found["transformer_blocks.0.attn.to_q.weight"], right)
    assert close(found["transformer_blocks.0.attn.to_q.bias"], 2 * random(12))


def test_what_is_refused(tmp_path: Path) -> None:
    keys = keyed("peft", f"unet.{ATTENTION}.to_q.{{}}.weight")
    name = f"unet.{ATTENTION}.to_out.0"
    of_two_ranks = {**keys, f"{name}.lora_A.weight": random(2, 8), f"{name}.lora_B.weight": random(12, 2)}
    with pytest.raises(UsageError, match="2 ranks") as asked:
        wl.apply(pipeline(), lora(tmp_path, of_two_ranks))
    assert asked.value.offenders == ("rank 2: 1 modules", "rank 4: 1 modules")
    of_two_names = {f"unet.{ATTENTION}.to_q.lora_{s}.{n}.weight": t for n in "ab" for s, t in (("A", DOWN), ("B", UP))}
    with pytest.raises(UnsupportedFormatError, match="2 adapters"):
        wl.apply(pipeline(), lora(tmp_path, of_two_names))
    with pytest.raises(UnsupportedFormatError, match="not computed"):
        wl.apply(pipeline(), lora(tmp_path, {**keys, "unet.conv_in.weight": random(2, 2)}))
    for wrong in (
        {f"unet.{ATTENTION}.to_q.lora_A.weight": random(3, 8)},
        {f"unet.{ATTENTION}.to_q.lora_A.weight": random(4)},
        {f"{name}.lora_A.weight": DOWN},
    ):
        with pytest.raises(MalformedFileError, match="make no sense"):
            wl.apply(pipeline(), lora(tmp_path, {**keys, **wrong}))
    for settings in ({"unet.lora_alpha": "8"}, {"unet.lora_alpha": 8, "unet.alpha_pattern": {"a": None}}, [1]):
        save_file(keys, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(MalformedFileError, match="not as it should be"):
            wl.apply(pipeline(), tmp_path / "x.safetensors")
