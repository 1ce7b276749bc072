"""What weightlab keeps beside a model with patches on, which may have come with the model; and a change half done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_bytes, of_json, of_safetensors
from tests.fuzz.samples_models import save_model, state
from weightlab.files import disk

READERS = {
    "status": lambda d: wl.status(d / "model"),
    "verify": lambda d: wl.verify(d / "model"),
    "diff": lambda d: wl.diff(d / "base", d / "model", d / "made.safetensors", encode="dense"),
    "apply": lambda d: wl.apply(d / "model", d / "more.safetensors", in_place=True),
    "apply out": lambda d: wl.apply(d / "model", (), out=d / "out"),
    "scale": lambda d: wl.scale(d / "model", d / "patch.safetensors", 0.5),
    "remove": lambda d: wl.remove(d / "model", d / "patch.safetensors"),
    "remove all": lambda d: wl.remove(d / "model", everything=True),
    "forget": lambda d: wl.remove(d / "model", drop_record=True),
}


def _with_patches(folder: Path) -> None:
    base = save_model(folder / "base", 1)
    save_model(folder / "model", 1)
    part = {**state(1), "model.norm.weight": state(2)["model.norm.weight"]}
    wl.diff(base, part, folder / "patch.safetensors", encode="exact")
    wl.diff(base, {**state(3), "steps": state()["steps"]}, folder / "more.safetensors", encode="dense")
    wl.apply(folder / "model", folder / "patch.safetensors", in_place=True)


@kind(
    "stack",
    {
        "model/.weightlab/**/stack.json": of_json,
        "model/.weightlab/**/*.safetensors": of_safetensors,
        "model/model.safetensors": of_safetensors,
    },
    READERS,
    share=6,
)
def _stack(folder: Path) -> None:
    _with_patches(folder)


@kind("intent", {"model/.weightlab/**/*.json": of_json, "model/.weightlab/**/*": of_bytes}, READERS, share=6)
def _intent(folder: Path) -> None:
    _with_patches(folder)
    child = os.fork()
    if child == 0:
        begun = 0

        def end(operation: str, *arguments: Any) -> None:
            nonlocal begun
            begun += any((folder / "model" / ".weightlab").glob("*/intent.json"))
            if begun > 3:
                os._exit(0)

        disk.observer = end
        try:
            wl.apply(folder / "model", folder / "more.safetensors", in_place=True)
        finally:
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise AssertionError("the change was not broken off")
