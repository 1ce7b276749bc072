"""The k elements of largest magnitude of a tensor that comes in tiles, exactly, without a sort.

The magnitude of the k-th is found from histograms of the magnitudes' bit patterns, 16 bits at a time from the top: each
pass looks at those elements only that share the upper bits of the limit. Of elements that are equal to it the first
ones count, so that there are always k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightlab.tensors.arithmetic import bits

Pattern = np.ndarray[Any, np.dtype[Any]]
Tiles = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True, slots=True)
class Limit:
    """Which elements are among the largest.

    Attributes:
        pattern: the bit pattern of the k-th magnitude.
        equals: how many elements with this magnitude are among them.
        every: whether those are all that have it.
    """

    pattern: int
    equals: int
    every: bool

    def chosen(self, values: Tensor, left: int) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], int]:
        """Which elements of a tile (flat) are among the largest.

        Args:
            left: how many equals are to be had from here on; at the first tile `equals`.

        Returns:
            (bool array, how many equals are left).
        """
        pattern = _pattern(values)
        if self.every:
            return pattern >= self.pattern, left
        chosen = pattern > self.pattern
        equal = np.flatnonzero(pattern == self.pattern)[:left]
        chosen[equal] = True
        return chosen, left - len(equal)

    def count_equals(self, values: Tensor) -> int:
        """How many elements of a tile have the limit's magnitude."""
        return int(np.count_nonzero(_pattern(values) == self.pattern))


def largest(tiles: Tiles, keep: int, dtype: torch.dtype) -> Limit:
    """The limit of the `keep` largest magnitudes.

    Args:
        tiles: begins a pass over all elements: flat tensors of fp32 or fp64, finite.
        keep: at least 1; at most the number of elements.
        dtype: of the tiles.
    """
    limit, equals, there = 0, keep, 0
    width = 64 if dtype == torch.float64 else 32
    for shift in range(width - 16, -1, -16):
        histogram = np.zeros(2**16, dtype=np.int64)
        for values in tiles():
            pattern = _pattern(values)
            if shift + 16 < width:
                pattern = pattern[pattern >> (shift + 16) == limit]
            histogram += np.bincount((pattern >> shift) & 0xFFFF, minlength=2**16)
        bucket, above = _bucket(histogram, equals)
        limit, equals, there = limit << 16 | bucket, equals - above, int(histogram[bucket])
    return Limit(limit, equals, equals == there)


def _pattern(values: Tensor) -> Pattern:
    """The bit patterns of the magnitudes, int32 or int64: ordered as the magnitudes are."""
    pattern: Pattern = bits(values.abs()).numpy()
    return pattern


def _bucket(histogram: np.ndarray[Any, np.dtype[np.int64]], rank: int) -> tuple[int, int]:
    """The bucket with the rank-th largest element (rank from 1), and how many elements are in higher ones."""
    from_top = np.cumsum(histogram[::-1])
    position = min(int(np.searchsorted(from_top, rank)), len(histogram) - 1)
    return len(histogram) - 1 - position, int(from_top[position - 1]) if position else 0
