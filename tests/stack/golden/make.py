"""How the archives here were made: by weightlab 0.1.0 of commit 6e90e5e, before what it tests was changed.

    python tests/stack/golden/make.py version-0.1.zip twice-0.1.zip

For the first it makes a model of two shards and two patches, begins each of three changes in a child process, kills the
child right after a chosen system call, and packs the model's folder as it lies then. It is kept to say what is in the
archives, not to be run again: folders of version 0.1 must be read, recovered and changed for ever. In the first are:

    p.safetensors, q.safetensors        the patches: `p` exact, in both shards; `q` dense, meets `p` in one tensor
    states/NAME/                        the weights, as `apply --out` made them: clean, p, q, p+q, p+q@2
    CHANGE/STEP/                        the model's folder with its `.weightlab`; CHANGE: first (`p` goes on a clean
                                        model), second (`q` joins `p`), last (`p`, the only one, comes off)

The second holds `m/model.safetensors`, all ones, on which a patch of +1 went, and once more after an index had come
beside the file: that version took the patched bytes for clean.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.files import disk

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BUSY = ".weightlab-busy"

# step: (operation, what its last path ends with, how often it is seen before the kill)
STEPS: dict[str, tuple[str, str, int]] = {
    "clean bytes half kept": ("write", ".bin.partial", 1),
    "patch half kept": ("link", "patch.safetensors", 1),
    "before the intent": ("sync_folder", "/model", 1),
    "intent half written": ("create", ".partial intent", 1),
    "after the intent": ("rename", "intent.json", 1),
    "one shard set aside": ("rename", BUSY, 1),
    "shards set aside": ("rename", BUSY, 2),
    "half written": ("write", BUSY, 1),
    "written": ("sync", BUSY, 2),
    "committed": ("rename", "stack.json", 1),
    "one name back": ("rename", SHARDS[0], 1),
    "finished, garbage left": ("unlink", "intent.json", 1),
    "garbage half collected": ("unlink", ".bin", 1),
}


def model(folder: Path) -> Path:
    """Two shards and their index."""
    generator = torch.Generator().manual_seed(11)
    folder.mkdir()
    tensors = {
        SHARDS[0]: {"a": torch.randn(5, 4, generator=generator), "b": torch.arange(3)},
        SHARDS[1]: {"c": torch.randn(4, 3, generator=generator).bfloat16()},
    }
    for name, held in tensors.items():
        save_file(held, folder / name)
    weight_map = {tensor: name for name, held in tensors.items() for tensor in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def patches() -> None:
    generator = torch.Generator().manual_seed(12)
    base = state_of(Path("clean"))
    tuned = {"a": base["a"] + torch.randn(5, 4, generator=generator), "b": base["b"] + 1, "c": base["c"] * 1.5}
    wl.diff(base, tuned, "p.safetensors", encode="exact")
    wl.diff(base, base | {"a": base["a"] * 1.25, "c": base["c"] + 0.25}, "q.safetensors", encode="dense:fp32")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for s in SHARDS for n, t in load_file(folder / s).items()}


def killed(action: Callable[[], object], operation: str, ends: str, times: int) -> bool:
    """Does it in a child that is killed after the given call; False: it came to its end before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def observe(found: str, *arguments: Any) -> None:
            nonlocal seen
            paths = [str(a) for a in arguments if isinstance(a, Path)]
            name = paths[-1]
            if ends == ".partial intent":
                hit = ".intent.json." in name
            elif ends == ".bin":
                hit = name.endswith(".bin") or "patches/" in name
            else:
                hit = name.endswith(ends) and (operation != "rename" or ends != "stack.json" or intent(name))
            if hit and found in (operation, "rmtree" if ends == ".bin" else operation):
                seen += 1
                if seen == times:
                    os.kill(os.getpid(), signal.SIGKILL)

        disk.observer = observe
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def intent(stack: str) -> bool:
    """Whether that stack.json is a commit, and not the empty record that comes before kept bytes."""
    return Path(stack).with_name("intent.json").exists()


CHANGES: dict[str, tuple[list[str], Callable[[], object]]] = {
    "first": ([], lambda: wl.apply("model", "p.safetensors", in_place=True)),
    "second": (["p.safetensors"], lambda: wl.apply("model", "q.safetensors", in_place=True)),
    "last": (["p.safetensors"], lambda: wl.remove("model", "p.safetensors")),
}


def main(archive: Path) -> None:
    here = archive.absolute()
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(here, "w", zipfile.ZIP_DEFLATED) as packed:
        os.chdir(place)
        model(Path("clean"))
        patches()
        for name in ("p.safetensors", "q.safetensors"):
            add(packed, Path(name), name)
        for name, operands in {
            "clean": [],
            "p": ["p.safetensors"],
            "q": ["q.safetensors"],
            "p+q": ["p.safetensors", "q.safetensors"],
            "p+q@2": ["p.safetensors", "q.safetensors@2"],
        }.items():
            wl.apply("clean", operands, out="state")
            for shard in SHARDS:
                add(packed, Path("state") / shard, f"states/{name}/{shard}")
            shutil.rmtree("state")
        for change, (on, action) in CHANGES.items():
            for step, (operation, ends, times) in {"whole": ("", "", 0), **STEPS}.items():
                shutil.rmtree("model", ignore_errors=True)
                model(Path("model"))
                if on:
                    wl.apply("model", on, in_place=True)
                if step == "whole":
                    action()
                elif not killed(action, operation, ends, times):
                    print(f"{change}: no such step: {step}")
                    continue
                for item in sorted(Path("model").rglob("*")):
                    add(packed, item, f"{change}/{step}/{item.relative_to('model')}")
        os.chdir("/")


def twice(archive: Path) -> None:
    here = archive.absolute()
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(here, "w", zipfile.ZIP_DEFLATED) as packed:
        os.chdir(place)
        base = {"w": torch.ones(4, 4)}
        os.mkdir("m")
        save_file(base, "m/model.safetensors")
        wl.diff(base, {"w": base["w"] + 1}, "p.safetensors", encode="dense")
        wl.apply("m", "p.safetensors", in_place=True)
        index = {"metadata": {}, "weight_map": {"w": "model.safetensors"}}
        Path("m/model.safetensors.index.json").write_text(json.dumps(index))
        wl.apply("m", "p.safetensors", in_place=True)
        for item in sorted(Path("m").rglob("*")):
            add(packed, item, str(item))
        os.chdir("/")


def add(packed: zipfile.ZipFile, path: Path, name: str) -> None:
    info = zipfile.ZipInfo(name + ("/" if path.is_dir() else ""), (2026, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    packed.writestr(info, b"" if path.is_dir() else path.read_bytes())


if __name__ == "__main__":
    first, second = (Path(word).absolute() for word in sys.argv[1:])
    main(first)
    twice(second)
