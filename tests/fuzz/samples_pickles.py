"""Checkpoints pickled by torch, in both of its formats and in shards."""

from __future__ import annotations

import argparse
import collections
import json
import types
from pathlib import Path

import numpy
import torch

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_bytes, of_json, of_zip
from tests.fuzz.samples_models import save_model, state

READERS = {
    "diff": lambda d: wl.diff(d / "base", d / "model", d / "made.safetensors", encode="dense"),
    "diff from": lambda d: wl.diff(d / "model", d / "base"),
    "apply": lambda d: wl.apply(d / "model", d / "patch.safetensors", out=d / "out"),
    "inspect": lambda d: wl.inspect(d / "model"),
    "verify": lambda d: wl.verify(d / "model"),
}


def _begin(folder: Path) -> None:
    base = save_model(folder / "base", 1)
    wl.diff(base, {**state(2), "steps": state()["steps"]}, folder / "patch.safetensors", encode="dense")
    (folder / "model").mkdir()


@kind("pickle", {"model/pytorch_model.bin": of_zip}, READERS, share=8)
def _zip(folder: Path) -> None:
    _begin(folder)
    torch.save(state(), folder / "model" / "pytorch_model.bin")


@kind("old pickle", {"model/pytorch_model.bin": of_bytes}, READERS, share=6)
def _legacy(folder: Path) -> None:
    _begin(folder)
    torch.save(state(), folder / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@kind("nested pickle", {"model/model.pt": of_zip}, READERS, share=4)
def _nested(folder: Path) -> None:
    _begin(folder)
    torch.save({"state_dict": state(), "epoch": 3, "note": "x", "lr": [0.1]}, folder / "model" / "model.pt")


def _of_training() -> dict[str, object]:
    """What trainers keep beside the weights, and tensors that share a storage, or lie in it in their own way."""
    weights = collections.OrderedDict(state())
    weights["tied"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.arange(64.0).reshape(8, 8).T
    weights["extra"] = None  # type: ignore[assignment]
    options = argparse.Namespace(lr=0.1, betas=(0.9, 0.99), device=torch.device("cpu"), path=Path("a/b"))
    moments = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "model": weights,
        "optimizer": moments,
        "args": options,
        "more": types.SimpleNamespace(best=numpy.float64(0.5), loss=numpy.arange(3), kind=numpy.dtype("float32")),
        "epoch": 3,
    }


@kind("pickle of training", {"model/model.pt": of_zip}, READERS, share=4)
def _training(folder: Path) -> None:
    _begin(folder)
    torch.save(_of_training(), folder / "model" / "model.pt")


@kind("old pickle of training", {"model/model.pt": of_bytes}, READERS, share=3)
def _old_training(folder: Path) -> None:
    _begin(folder)
    torch.save(_of_training(), folder / "model" / "model.pt", _use_new_zipfile_serialization=False)


@kind("pickle index", {"model/*.index.json": of_json}, READERS, share=4)
def _shards(folder: Path) -> None:
    _begin(folder)
    names = sorted(state())
    weight_map: dict[str, str] = {}
    for n in range(2):
        file = f"pytorch_model-{n + 1:05d}-of-00002.bin"
        part = {name: state()[name] for name in names[n::2]}
        torch.save(part, folder / "model" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
