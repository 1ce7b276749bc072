"""Tied weights: one tensor under two names, which a file may hold once or twice.

Tied input and output embeddings are stored once by some writers and twice by others. A copy that only one of two
checkpoints stores is no difference between them; it is recognised by its bytes, whatever the architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from weightlab.sources import Source
from weightlab.tensors.tiles import tiles

_CHUNK = 2**21
_GLANCE = 4096


def same_bytes(source: Source, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint have equal bytes; unequal ones are mostly told apart by a glance."""
    size = source.specs[name].nbytes
    bounds = [0, min(_GLANCE, size), *range(_CHUNK, size, _CHUNK), size]
    for start, stop in itertools.pairwise(bounds):
        first, second = (torch.empty(max(0, stop - start), dtype=torch.uint8) for _ in range(2))
        source.read(name, start, first)
        source.read(other, start, second)
        if not torch.equal(first, second):
            return False
    return True


def redundant_copy_of(source: Source, name: str, candidates: Iterable[str]) -> str | None:
    """The tensor among `candidates` that `name` is a redundant copy of; None when there is none.

    Only matrices whose elements differ count: constant tensors are equal by chance, not by tying.
    """
    spec = source.specs.get(name)
    if spec is None or len(spec.shape) != 2 or not spec.numel or _constant(source, name):
        return None
    for other in candidates:
        twin = source.specs.get(other)
        alike = other != name and twin is not None and (twin.dtype, twin.shape) == (spec.dtype, spec.shape)
        if alike and same_bytes(source, name, other):
            return other
    return None


def _constant(source: Source, name: str) -> bool:
    """Whether all elements are equal: read until one differs, which is soon in anything that was trained."""
    spec = source.specs[name]
    first: torch.Tensor | None = None
    for start, stop in tiles(spec.stored.numel):
        raw = torch.empty((stop - start) * spec.stored.type.itemsize, dtype=torch.uint8)
        source.read(name, start * spec.stored.type.itemsize, raw)
        rows = raw.reshape(stop - start, -1)
        first = rows[0].clone() if first is None else first
        if bool((rows != first).any()):
            return False
    return True
