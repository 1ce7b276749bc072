"""One tensor of the base beside the same tensor of the tuned checkpoint, read tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from weightlab.encodings import Tile
from weightlab.encodings.exact import as_dtype
from weightlab.errors import NonFiniteError, RangeError
from weightlab.sources import Source
from weightlab.stream.executor import Resources, Room
from weightlab.tensors.arithmetic import is_finite
from weightlab.tensors.spec import TensorSpec, compute_dtype
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace


class TensorPair:
    """A tensor in both checkpoints.

    Attributes:
        base: None for an added tensor, as is base_spec.
        spec: of what the patch will be put on: the base's dtype and the tuned shape; for a lossless encoding, or an
            added tensor, the tuned one's own spec.
        tuned_spec: of the tuned tensor.
    """

    def __init__(
        self,
        base: Source | None,
        tuned: Source,
        name: str,
        *,
        lossless: bool,
        opaque: bool,
        allow_nonfinite: bool,
    ) -> None:
        self.base, self.tuned, self.name = base, tuned, name
        self.tuned_spec = tuned.specs[name]
        self.base_spec = None if base is None else base.specs[name]
        dtype = self.tuned_spec.dtype if lossless or self.base_spec is None else self.base_spec.dtype
        self.spec = TensorSpec(name, dtype, self.tuned_spec.shape)
        self.lossless, self.opaque = lossless, opaque
        self.allow_nonfinite = allow_nonfinite
        self.compute = compute_dtype(self.tuned_spec, *([self.base_spec] if self.base_spec else []))

    def raw(self, start: int, stop: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
        """(base bytes, tuned bytes) of an element range, as stored; the base's part may be shorter or empty."""
        tuned = self._read(self.tuned, self.tuned_spec, start, stop, "tuned", workspace)
        if self.base is None or self.base_spec is None:
            return workspace.buffer("base", 0, torch.uint8), tuned
        return self._read(self.base, self.base_spec, start, stop, "base", workspace), tuned

    @staticmethod
    def _read(source: Source, spec: TensorSpec, start: int, stop: int, key: str, workspace: Workspace) -> Tensor:
        size = spec.stored.type.itemsize
        stop = min(stop, spec.stored.numel)
        raw = workspace.buffer(key, max(0, stop - start) * size, torch.uint8)
        if raw.numel():
            source.read(spec.name, start * size, raw)
        return raw

    def tile(self, start: int, stop: int, base_raw: Tensor, tuned_raw: Tensor, workspace: Workspace) -> Tile:
        """The tile for an encoder, from the bytes that `raw` gave.

        Raises:
            NonFiniteError: NaN or infinity in a float tensor, unless allowed; names the tensor and its checkpoints.
            RangeError: the delta of finite values is beyond the compute dtype, and is what will be stored.
        """
        count = stop - start
        tuned_type = self.tuned_spec.stored.type.torch
        base_type = self.base_spec.stored.type.torch if self.base_spec else tuned_type
        assert tuned_type is not None and base_type is not None
        tuned = tuned_raw.view(tuned_type)
        base = _padded(base_raw.view(base_type), count, workspace, base_type)
        if self.opaque:
            return Tile(start, stop, base, tuned, torch.empty(0))
        delta = workspace.buffer("delta", count, self.compute)
        delta.copy_(tuned)
        delta.sub_(base if base.dtype == delta.dtype else base.to(delta.dtype))
        if not is_finite(delta):
            self._check(base, tuned, delta)
        return Tile(start, stop, as_dtype(base, tuned.dtype), tuned, delta)

    def _check(self, base: Tensor, tuned: Tensor, delta: Tensor) -> None:
        sides = [s.label for s, t in ((self.base, base), (self.tuned, tuned)) if s is not None and not is_finite(t)]
        if sides and not self.allow_nonfinite:
            raise NonFiniteError("NaN or infinity in the weights", "", [f"{self.name} of {s}" for s in sides])
        overflowed = torch.isfinite(base.to(delta.dtype)) & torch.isfinite(tuned.to(delta.dtype))
        overflowed &= ~torch.isfinite(delta)
        if not self.lossless and bool(overflowed.any()):
            raise RangeError("the delta is too large", "store it exact", [f"{self.name}: beyond {delta.dtype}"])


def _padded(values: Tensor, count: int, workspace: Workspace, dtype: torch.dtype) -> Tensor:
    if values.numel() == count:
        return values
    padded = workspace.buffer("padded base", count, dtype)
    padded[: values.numel()].copy_(values)
    padded[values.numel() :].zero_()
    return padded


class PairDelta:
    """The delta of a pair as an encoder's `prepare` reads it (see `encodings.DeltaReader`).

    Attributes:
        was_whole: whether the encoder asked for the whole matrix.
    """

    def __init__(self, pair: TensorPair, workspace: Workspace, resources: Resources, room: Room) -> None:
        self.spec, self.compute = pair.spec, pair.compute
        self.was_whole = False
        self._pair, self._workspace, self._resources, self._room = pair, workspace, resources, room

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in tiles(self.spec.stored.numel):
            base, tuned = self._pair.raw(start, stop, self._workspace)
            yield start, stop, self._pair.tile(start, stop, base, tuned, self._workspace).delta

    @contextmanager
    def matrix(self) -> Iterator[Tensor]:
        self._resources.require_matrix(self.spec.numel, self.spec.name)
        self.was_whole = True
        with self._room.take(self.spec.numel):
            whole = torch.empty(self.spec.numel, dtype=self.compute)
            for start, stop, delta in self.tiles():
                whole[start:stop] = delta
            yield whole.reshape(self.spec.rows, self.spec.columns)
