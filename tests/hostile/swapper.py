"""A process that puts links in the place of files and folders and takes them away again, as fast as it can.

Arguments: a seed, the folder of a scene, what in it is a stranger's. Ends when its standard input is closed.
"""

from __future__ import annotations

import os
import random
import select
import sys
from contextlib import suppress
from pathlib import Path


def main(seed: int, root: Path, kind: str) -> None:
    generator = random.Random(seed)
    stranger, victim = root / "stranger" / kind, root / "victim"
    aside = root / "stranger" / f"aside-{seed}"
    while not select.select([sys.stdin], [], [], 0)[0]:
        place = generator.choice(sorted(stranger.rglob("*")) or [stranger / "nothing"])
        beside = victim / place.name
        with suppress(OSError):
            os.rename(place, aside)
        with suppress(OSError):
            os.symlink(beside if beside.exists() else victim, place)
        select.select([sys.stdin], [], [], generator.choice((0, 0.0005, 0.003, 0.02)))
        with suppress(OSError):
            os.unlink(place)
        with suppress(OSError):
            os.rename(aside, place)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
