"""Models whose `.weightlab` was made by someone who means harm, and a look at everything around them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import weightlab as wl

SHARD = "model.safetensors"
STATE = Path("model/.weightlab") / f"{SHARD}.stack"
VICTIM = "victim"


def lay_out(*, begun: bool = False) -> None:
    """In the current folder: `victim` with files of someone's, patches `p` and `q`, and `model` with `p` on.

    Args:
        begun: a change has begun: `q` shall come on, the shard is set aside.
    """
    base = {"w": torch.ones(4, 4), "v": torch.zeros(3)}
    os.makedirs(f"{VICTIM}/sub/{'a' * 64}")
    for name in ("thesis.txt", "1.bin", "stack.json", f".{SHARD}.0123abcd.partial", "sub/y", f"sub/{'a' * 64}/z"):
        Path(VICTIM, name).write_text(f"mine: {name}")
    save_file(base, f"{VICTIM}/{SHARD}")
    os.mkdir("model")
    save_file(base, f"model/{SHARD}")
    shutil.copytree("model", "clean")
    wl.diff("clean", {"w": base["w"] + 1, "v": base["v"]}, "p.safetensors", encode="dense")
    wl.diff("clean", {"w": base["w"], "v": base["v"] + 1}, "q.safetensors", encode="dense")
    wl.apply("model", "p.safetensors", in_place=True)
    if begun:
        stack: dict[str, Any] = json.loads((STATE / "stack.json").read_text())
        intent = {"new": stack | {"sequence": 2}, "shards": [SHARD], "rewrite": ["w"]}
        (STATE / "intent.json").write_text(json.dumps(intent))
        os.rename(f"model/{SHARD}", f"model/{SHARD}.weightlab-busy")


def edit(name: str, change: Callable[[Any], object]) -> None:
    """Changes a record."""
    tree = json.loads((STATE / name).read_text())
    change(tree)
    (STATE / name).write_text(json.dumps(tree))


def around(*folders: str) -> dict[str, tuple[object, ...]]:
    """Everything in folders: what it is, its inode, when its content changed, and its bytes or where it leads."""
    found: dict[str, tuple[object, ...]] = {}
    for folder in folders:
        for path in [Path(folder), *sorted(Path(folder).rglob("*"))]:
            state = path.lstat()
            what: object = None
            if path.is_symlink():
                what = os.readlink(path)
            elif path.is_file():
                what = path.read_bytes()
            found[str(path)] = (state.st_mode, state.st_ino, state.st_nlink, state.st_mtime_ns, what)
    return found
