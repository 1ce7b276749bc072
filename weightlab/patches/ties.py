"""Tied weights: one tensor under two names, which a file may hold once or twice.

Tied input and output embeddings are stored once by some writers and twice by others. A copy that only one of two
checkpoints stores is no difference between them; it is recognised by its bytes, whatever the architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TypeAlias

import torch
from blake3 import blake3

from weightlab.sources import Source
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import tiles

_CHUNK = 2**21
_GLANCE = 4096
_Kind: TypeAlias = tuple[str, tuple[int, ...], str]


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


def _kind(name: str, spec: TensorSpec) -> _Kind:
    return spec.dtype, spec.shape, name.rpartition("/")[0]


class Copies:
    """Finds tensors that are redundant copies of some others of a checkpoint.

    However many there are, of each a glance is read at most once, and all of it at most once more: those that look
    alike at a glance are told apart by their digests.

    Args:
        candidates: what others may be copies of, the preferred ones first; what the checkpoint lacks is ignored.
    """

    def __init__(self, source: Source, candidates: Iterable[str]) -> None:
        self._source = source
        self._kinds: dict[_Kind, list[str]] = {}
        for name in candidates:
            spec = source.specs.get(name)
            if spec is not None and len(spec.shape) == 2 and spec.numel:
                self._kinds.setdefault(_kind(name, spec), []).append(name)
        self._alike: dict[_Kind, dict[bytes, list[str]]] = {}
        self._digests: dict[str, bytes] = {}

    def of(self, name: str) -> str | None:
        """The first candidate that a tensor is a redundant copy of; None when there is none.

        Only matrices whose elements differ count: constant tensors are equal by chance, not by tying. Nor are tensors
        of two parts of a model (`text_encoder/…`, `text_encoder_2/…`) tied to one another.
        """
        spec = self._source.specs.get(name)
        kind = None if spec is None else _kind(name, spec)
        if kind is None or all(other == name for other in self._kinds.get(kind, ())):
            return None
        if kind not in self._alike:
            self._alike[kind] = {}
            for other in self._kinds[kind]:
                self._alike[kind].setdefault(self._glance(other), []).append(other)
        alike = [other for other in self._alike[kind].get(self._glance(name), ()) if other != name]
        if len(alike) == 1:
            found = alike[0] if same_bytes(self._source, name, alike[0]) else None
        else:
            found = next((other for other in alike if self._digest(other) == self._digest(name)), None)
        return None if found is None or _constant(self._source, name) else found

    def _glance(self, name: str) -> bytes:
        raw = torch.empty(min(_GLANCE, self._source.specs[name].nbytes), dtype=torch.uint8)
        self._source.read(name, 0, raw)
        return blake3(raw.numpy().data).digest()

    def _digest(self, name: str) -> bytes:
        if name not in self._digests:
            hasher, size = blake3(), self._source.specs[name].nbytes
            for start in range(0, size, _CHUNK):
                raw = torch.empty(min(_CHUNK, size - start), dtype=torch.uint8)
                self._source.read(name, start, raw)
                hasher.update(raw.numpy().data)
            self._digests[name] = hasher.digest()
        return self._digests[name]


def redundant_copy_of(source: Source, name: str, candidates: Iterable[str]) -> str | None:
    """The tensor among `candidates` that `name` is a redundant copy of. For several names make one `Copies`."""
    return Copies(source, candidates).of(name)


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
