"""Patches of every encoding, in one file and in shards."""

from __future__ import annotations

from pathlib import Path

import torch

import weightlab as wl
from tests.fuzz.kinds import Reader, kind
from tests.fuzz.mutations import of_json, of_safetensors
from tests.fuzz.samples_models import save_model, state
from weightlab.patches import layout


def _readers(name: str) -> dict[str, Reader]:
    return {
        "open": lambda d: wl.open_patch(d / name),
        "verify": lambda d: wl.verify(d / name),
        "verify on": lambda d: wl.verify(d / name, base=d / "base"),
        "inspect": lambda d: wl.inspect(d / name),
        "apply": lambda d: wl.apply(d / "base", d / name, out=d / "out"),
        "apply in place": lambda d: wl.remove(wl.apply(d / "base", d / name, in_place=True).model, everything=True),
        "apply in memory": lambda d: wl.apply(state(1), d / name),
        "compose": lambda d: wl.compose(
            [d / name, d / "other.safetensors"], d / "composed.safetensors", base=d / "base", encode="dense"
        ),
        "compare": lambda d: wl.compare([d / name, d / "other.safetensors"], base=d / "base"),
        "save": lambda d: (0.5 * wl.open_patch(d / name)).save(d / "saved"),
        "export": lambda d: wl.lora_export(d / name, d / "lora", model=d / "base", rank=1),
    }


def _made(folder: Path, encode: str, name: str) -> None:
    base = save_model(folder / "base", 1, config=True)
    wl.diff(base, state(3), folder / "other.safetensors", encode="dense")
    tuned = state(2)
    if encode == "exact" or name != ONE_FILE:
        tuned["added"] = torch.ones(3)
        del tuned["model.layers.0.self_attn.k_proj.weight"]
    wl.diff(base, tuned, folder / name, encode=encode, allow=("added", "removed"))


ENCODINGS = {
    "exact": "exact",
    "dense": "dense:bf16",
    "sparse": "sparse:0.3",
    "low_rank": "low_rank:2",
    "sign": "sign",
    "quantized": "quantized:4",
}
ONE_FILE = "patch.safetensors"
for _name, _encode in ENCODINGS.items():

    @kind(f"patch {_name}", {ONE_FILE: of_safetensors}, _readers(ONE_FILE), share=3)
    def _patch(folder: Path, encode: str = _encode) -> None:
        _made(folder, encode, ONE_FILE)


@kind("patch in shards", {"patch/*.json": of_json, "patch/*-of-*.safetensors": of_safetensors}, _readers("patch"))
def _shards(folder: Path) -> None:
    usual = layout.SHARD_BYTES
    layout.SHARD_BYTES = 400
    try:
        _made(folder, "dense", "patch")
    finally:
        layout.SHARD_BYTES = usual
