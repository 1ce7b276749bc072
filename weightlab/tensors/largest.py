"""The k elements of largest magnitude of a tensor that comes in tiles, exactly, without a sort.

The magnitude of the k-th is found from histograms of the magnitudes' bit patterns, 16 bits at a time from the top: each
pass looks at those elements only that share the upper bits of the limit. Of elements that are equal to it the first
ones count, so that there are always k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightlab.tensors.arithmetic import bits

Counts = np.ndarray[Any, np.dtype[np.int64]]
Pattern = np.ndarray[Any, np.dtype[Any]]
Tiles = Callable[[], Iterable[Tensor]]

_REMEMBERED = 2**20
"""So many bit patterns are kept in memory, to know how many equals a tile has without another pass."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Which elements are among the largest.

    Attributes:
        pattern: the bit pattern of the k-th magnitude.
        equals: how many elements with this magnitude are among them.
        every: whether those are all that have it.
        by_tile: how many elements of each tile have this magnitude; None: not known.
        finite: whether all elements are.
    """

    pattern: int
    equals: int
    every: bool
    by_tile: Sequence[int] | None
    finite: bool

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

    def drop(self, values: Tensor, kept: int | None) -> None:
        """Makes zero, in place, what is not among the largest of a tile (flat).

        Args:
            kept: how many of its equals are among them, the first ones; None: all.
        """
        if self.pattern == 0:
            return  # what is dropped is zero already
        if self.finite and kept in (None, 0):
            dtype = np.float64 if values.dtype == torch.float64 else np.float32
            word = np.uint64 if values.dtype == torch.float64 else np.uint32
            greatest = word(self.pattern - (kept is None)).view(dtype)  # magnitude that is dropped
            torch.hardshrink(values, float(greatest), out=values)  # to which NaN is no large number: hence `finite`
            return
        chosen, _ = self.chosen(values, values.numel() if kept is None else kept)
        values.mul_(torch.from_numpy(chosen))


def largest(tiles: Tiles, keep: int, dtype: torch.dtype) -> Limit:
    """The limit of the `keep` largest magnitudes.

    Args:
        tiles: begins a pass over all elements: flat tensors of fp32 or fp64.
        keep: at least 1; at most the number of elements.
        dtype: of the tiles.
    """
    width = 64 if dtype == torch.float64 else 32
    histogram = np.zeros(2**16, dtype=np.int64)
    for values in tiles():
        histogram += np.bincount(_upper(values), minlength=2**16)
    histogram = histogram[: 2**15] + histogram[2**15 :]  # whatever the sign
    finite = not histogram[0x7FF0 if width == 64 else 0x7F80 :].any()
    found, above = _bucket(histogram, keep)
    equals = keep - above
    for shift in range(width - 32, -1, -16):
        histogram = np.zeros(2**16, dtype=np.int64)
        seen: list[tuple[Any, Any]] = []
        remembered = 0
        for values in tiles():
            patterns, counts = np.unique(_next(values, found, shift), return_counts=True)
            histogram[patterns] += counts
            remembered += len(patterns)
            if remembered <= _REMEMBERED:
                seen.append((patterns, counts))
        bucket, above = _bucket(histogram, equals)
        found, equals = found << 16 | bucket, equals - above
    by_tile = [int(counts[patterns == bucket].sum()) for patterns, counts in seen]
    known = by_tile if remembered <= _REMEMBERED else None
    return Limit(found, equals, equals == int(histogram[bucket]), known, finite)


def _upper(values: Tensor) -> Pattern:
    """The upper 16 bits of each, the sign among them. The same memory."""
    words: Pattern = values.contiguous().view(torch.int16).numpy().view(np.uint16)
    return words[values.element_size() // 2 - 1 :: values.element_size() // 2]


def _next(values: Tensor, found: int, shift: int) -> Pattern:
    """The 16 bits above the lowest `shift` of those elements in which those above, without the sign, are `found`."""
    pattern = bits(values).numpy()
    sign = 8 * values.element_size() - 1
    same = np.flatnonzero((pattern & (1 << sign) - (1 << shift + 16)) == found << shift + 16)
    return (pattern[same] >> shift).astype(np.uint16)


def _pattern(values: Tensor) -> Pattern:
    """The bit patterns of the magnitudes, int32 or int64: ordered as the magnitudes are."""
    pattern: Pattern = bits(values.abs()).numpy()
    return pattern


def _bucket(histogram: Counts, rank: int) -> tuple[int, int]:
    """The bucket with the rank-th largest element (rank from 1), and how many elements are in higher ones."""
    from_top = np.cumsum(histogram[::-1])
    position = min(int(np.searchsorted(from_top, rank)), len(histogram) - 1)
    return len(histogram) - 1 - position, int(from_top[position - 1]) if position else 0
