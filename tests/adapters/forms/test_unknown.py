"""What is an adapter of a form that is not computed is told by its own name, not as a damaged patch."""

from __future__ import annotations

from pathlib import Path

import pytest

import weightlab as wl
from tests.adapters.forms.test_kohya import lora, random
from weightlab.errors import UnsupportedFormatError


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("emb_params", "textual inversion"),
        ("clip_g", "textual inversion"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("prompt_embeddings", "trained prompts"),
        ("layers.3.lora_something", "not known"),
    ],
)
def test_other_forms(tmp_path: Path, key: str, says: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=says) as failed:
        wl.apply({"a.weight": random(2, 2)}, lora(tmp_path, {key: random(2, 2)}))
    assert "take a diff" in failed.value.remedy


def test_models_are_none(tmp_path: Path) -> None:
    """A model's own file is no adapter, whatever words are in its names."""
    inside = {"q.base_layer.weight": random(4, 2), "q.lora_A.v.weight": random(1, 2), "q.lora_B.v.weight": random(4, 1)}
    assert wl.inspect(lora(tmp_path, inside, "model.safetensors")).kind == "checkpoint"
    some = {"attn.w_lora.lora.0.weight": random(2, 2), "attn.q.weight": random(2, 2), "attn.k.weight": random(2, 2)}
    assert wl.inspect(lora(tmp_path, some, "model.safetensors")).kind == "checkpoint"
    for name in ("explora.weight", "flora_net.weight", "model.layers.0.self_attn.q_proj.weight"):
        file = lora(tmp_path, {name: random(2, 2)}, "model.safetensors")
        assert wl.inspect(file).kind == "checkpoint"
