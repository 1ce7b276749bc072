"""A process that swaps folders and files of a model for links to someone's files and back, as fast as it can.

Arguments: a seed, and the folder with `model`, `victim` and `aside`. Ends when its standard input is closed.
"""

from __future__ import annotations

import os
import random
import select
import sys
from contextlib import suppress
from pathlib import Path

STATE = Path("model/.weightlab/model.safetensors.stack")


def targets(generator: random.Random) -> tuple[Path, str]:
    """What is swapped next, and what a link in its place leads to."""
    choices: list[tuple[Path, str]] = [
        (STATE.parent, "victim/.weightlab"),
        (STATE, "victim/.weightlab/model.safetensors.stack"),
        (STATE / "originals", "victim/.weightlab/model.safetensors.stack/originals"),
        (STATE / "patches", "victim/.weightlab/model.safetensors.stack/patches"),
        (STATE / "copies", "victim/.weightlab/model.safetensors.stack/copies"),
        (STATE / "stack.json", "victim/.weightlab/model.safetensors.stack/stack.json"),
        (STATE / "intent.json", "victim/.weightlab/model.safetensors.stack/intent.json"),
        (Path("model/model.safetensors"), "victim/model.safetensors"),
        (Path("model/model.safetensors.weightlab-busy"), "victim/model.safetensors"),
    ]
    with suppress(OSError):
        for folder in ("originals", "patches"):
            choices += [
                (STATE / folder / name, f"victim/.weightlab/{STATE.name}/{folder}/{name}")
                for name in os.listdir(STATE / folder)
            ]
    return generator.choice(choices)


def main(seed: int, place: str) -> None:
    os.chdir(place)
    generator = random.Random(seed)
    aside = Path("aside") / str(seed)
    while not select.select([sys.stdin], [], [], 0)[0]:
        path, leads = targets(generator)
        with suppress(OSError):
            os.rename(path, aside)
        with suppress(OSError):
            os.symlink(os.path.abspath(leads), path)
        select.select([sys.stdin], [], [], generator.choice((0, 0, 0.0005, 0.003)))
        with suppress(OSError):
            if path.is_symlink():
                os.unlink(path)
        with suppress(OSError):
            os.rename(aside, path)
        if aside.exists():  # its place was taken meanwhile
            os.rename(aside, f"{aside}.{generator.random()}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
