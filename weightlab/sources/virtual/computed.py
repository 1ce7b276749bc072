"""Tensors that are computed, tile by tile, while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import TILE

Compute = Callable[[str, int, int], Tensor]
"""(name, first element, element after the last) to those elements, flat, in the tensor's dtype; first is a multiple of
TILE. What it returns is valid until the same thread calls it again."""


class ComputedSource:
    """Tensors by a function. Reads that begin at a multiple of `TILE` waste nothing.

    Args:
        specs: what it has.
        compute: called from several threads at a time.
    """

    def __init__(self, label: str, specs: Mapping[str, TensorSpec], compute: Compute) -> None:
        self.label: str = label
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = dict(specs)
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}
        self._compute = compute

    def read(self, name: str, start: int, out: Tensor) -> None:
        for first, last, inside, piece in tiles_of_read(self.specs[name], start, out):
            piece.copy_(self._compute(name, first, last).view(torch.uint8)[inside])

    def close(self) -> None:
        """Nothing of its own to give back."""


def tiles_of_read(spec: TensorSpec, start: int, out: Tensor) -> Iterator[tuple[int, int, slice, Tensor]]:
    """The tiles that a read of `out.numel()` bytes from byte `start` on meets.

    Yields:
        (first element, element after the last, the bytes of the tile that are wanted, where in `out` they go).
    """
    size, stop = spec.stored.type.itemsize, start + out.numel()
    for first in range(start // size // TILE * TILE, -(-stop // size), TILE):
        last = min(first + TILE, spec.stored.numel)
        begin, end = max(start, first * size), min(stop, last * size)
        yield first, last, slice(begin - first * size, end - first * size), out[begin - start : end - start]


def read_values(source: Source, name: str, start: int, stop: int, raw: Tensor) -> Tensor:
    """The elements [start, stop) of a tensor, flat, in its dtype.

    Args:
        raw: uint8, as many bytes as those take; filled, and what is returned is a view of it.
    """
    dtype = source.specs[name].type
    assert dtype.torch is not None
    source.read(name, start * dtype.itemsize, raw)
    return raw.view(dtype.torch)
