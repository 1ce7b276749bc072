"""GGUF files as sources: what transformers makes of them, under the names of its checkpoints."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import weightlab as wl
from weightlab.errors import InputError, MalformedFileError, UnknownNetworkError, UnsupportedFormatError

gguf = pytest.importorskip("gguf", reason="gguf is an extra")
transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")
VOCABULARY, WIDTH, HIDDEN, HEADS = 64, 64, 96, 4


def write(path: Path, kind: Any, *, leave_out: str = "") -> None:
    """A small Llama as llama.cpp writes it: its names, queries and keys permuted, matrices quantised."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(VOCABULARY)])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (VOCABULARY, WIDTH),
        "output": (VOCABULARY, WIDTH),
        "output_norm": (WIDTH,),
    }
    for block in range(2):
        own: dict[str, tuple[int, ...]] = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH)}
        own |= {"attn_output": (WIDTH, WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        own |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        if name == leave_out:
            continue
        values = generator.standard_normal(shape, dtype=np.float32)
        used = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_it_is_what_transformers_loads(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "small.gguf", gguf.GGMLQuantizationType[kind])
    done = wl.apply(tmp_path / "small.gguf", out=tmp_path / "out")
    assert any("dequantised" in note and kind in note and "not the weights" in note for note in done.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == loaded.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in found.items())


def test_it_is_a_base_like_any_other(tmp_path: Path) -> None:
    write(tmp_path / "small.gguf", gguf.GGMLQuantizationType.Q8_0)
    wl.apply(tmp_path / "small.gguf", out=tmp_path / "base")
    patch = wl.diff(tmp_path / "small.gguf", tmp_path / "base", notes="mine")
    assert patch.records == {} and (patch.header.notes or "").startswith("mine; small.gguf is dequantised (F32, Q8_0)")


def test_damaged_ones_and_folders(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises((MalformedFileError, InputError)):
        wl.inspect(tmp_path / "broken.gguf")
    with pytest.raises(UnsupportedFormatError, match="name the file itself"):
        wl.inspect(tmp_path)
    write(tmp_path / "less.gguf", gguf.GGMLQuantizationType.Q8_0, leave_out="blk.1.ffn_up")
    with pytest.raises(InputError, match="are missing") as caught:
        wl.inspect(tmp_path / "less.gguf")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 10**9),
        ("block_count", 60_000),
        ("block_count", 300),
        ("embedding_length", 10**9),
        ("feed_forward_length", 2**31),
        ("vocab_size", 4 * 10**9),
        ("attention.head_count", 10**9),
    ],
)
def test_a_network_that_the_tensors_cannot_be_of_is_not_made(tmp_path: Path, key: str, value: int) -> None:
    write(tmp_path / "small.gguf", gguf.GGMLQuantizationType.F16)
    raw = (tmp_path / "small.gguf").read_bytes()
    place = raw.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # its type comes first
    (tmp_path / "small.gguf").write_bytes(raw[:place] + struct.pack("<I", value) + raw[place + 4 :])
    with pytest.raises(UnknownNetworkError):
        wl.inspect(tmp_path / "small.gguf")
