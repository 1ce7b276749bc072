"""A process that changes checkpoints on command, each in a child of its own, so that a test can kill the child.

Reads lines of JSON {"verb", "model", "patch", "scale"} and answers each with the child's pid; the child does the work.
"""

from __future__ import annotations

import json
import os
import sys

import weightlab as wl
from weightlab.patches.compute import compute_tile  # noqa: F401  (imported before the fork, so that a child starts at once)


def change(verb: str, model: str, patch: str, scale: float) -> None:
    """Makes one change of a model on one thread."""
    resources = wl.Resources(threads=2)
    if verb == "apply":
        wl.apply(model, wl.open_patch(patch).at(scale), in_place=True, resources=resources)
    elif verb == "scale":
        wl.scale(model, patch, scale, resources=resources)
    elif verb == "remove":
        wl.remove(model, patch, resources=resources)
    else:
        wl.apply(model, patch, out=verb, resources=resources)


def main() -> None:
    for name in ("apply", "scale", "remove", "open_patch"):
        getattr(wl, name)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            code = 1
            try:
                change(**order)
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
