"""Compares two results of TIES where they have to be equal.

Differences of bf16 values lie on a coarse grid, so many have the very magnitude at which TIES begins to drop. Which of
those are dropped is anyone's choice (weightlab: the last; mergekit: as an unstable sort leaves them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _compare import Bits, Checkpoint, places
from _synthetic import widened


def compared(base: Path, tuned: Sequence[Path], density: float, theirs: Path, ours: Path) -> dict[str, Any]:
    """Counts bf16 values that differ, apart from those that hang on which elements at the limit are kept.

    Returns:
        `differing_values` of `values`, `units_apart`: how many units in the last place the furthest two are apart;
        `at_the_limit`: how many values were left out, and `differing_at_the_limit`.
    """
    models = [Checkpoint(path) for path in (base, *tuned, theirs, ours)]
    names = [model.names for model in models]
    if any(each != names[0] for each in names):
        raise ValueError("the models have not the same tensors")
    count = total = furthest = left_out = among = 0
    for name in sorted(names[0]):
        start, *others, their, our = (model.bits(name) for model in models)
        free = np.zeros(start.size, dtype=bool)
        for other in others:
            free |= _at_the_limit(start, other, density)
        differ = their != our
        count += int(np.count_nonzero(differ & ~free))
        among += int(np.count_nonzero(differ & free))
        total, left_out = total + start.size, left_out + int(np.count_nonzero(free))
        apart = np.abs(places(their) - places(our))
        furthest = max(furthest, int(apart[~free].max(initial=0)))
    return {
        "differing_values": count,
        "values": total - left_out,
        "units_apart": furthest,
        "names_in_one_only": 0,
        "at_the_limit": left_out,
        "differing_at_the_limit": among,
    }


def _at_the_limit(start: Bits, other: Bits, density: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Elements whose difference has the magnitude of the last that is kept, where not all of them are."""
    magnitude = np.abs(widened(other) - widened(start))
    keep = max(1, int(density * magnitude.size))
    limit = np.partition(magnitude, magnitude.size - keep)[magnitude.size - keep]
    equal: np.ndarray[Any, np.dtype[np.bool_]] = magnitude == limit
    if np.count_nonzero(magnitude >= limit) == keep:
        equal[:] = False
    return equal
