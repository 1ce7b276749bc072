"""A patch that is in no file: its differences are computed while they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from weightlab.encodings import Buffers
from weightlab.patches.header import SCHEMA, Base, Method, PatchHeader, Record, features_of
from weightlab.patches.parts import StoredParts
from weightlab.patches.patch import Patch, PatchFiles
from weightlab.sources import Source
from weightlab.stream.executor import Resources
from weightlab.tensors.spec import TensorSpec, compute_dtype

Cached = TypeVar("Cached")


class _ReadParts(StoredParts):
    """The one part of a dense tensor, read through a source."""

    def __init__(self, spec: TensorSpec, source: Source) -> None:
        super().__init__(spec, {}, {})
        self._source = source

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.spec, self._source.specs[self.spec.name])

    def numel(self, part: str) -> int:
        return self.spec.numel

    def read(self, part: str, start: int, stop: int, buffers: Buffers) -> Tensor:
        kind = self._source.specs[self.spec.name].type
        assert kind.torch is not None
        raw = buffers.buffer(f"part {part}", (stop - start) * kind.itemsize, torch.uint8)
        self._source.read(self.spec.name, start * kind.itemsize, raw)
        return raw.view(kind.torch)


@dataclass(frozen=True)
class DeltaPatch(Patch):
    """A difference that nothing stores, for one use; it cannot be saved or stay on a checkpoint.

    Attributes:
        delta: fp32 or fp64 values under the names of the patched tensors.
    """

    delta: Source = field(compare=False, kw_only=True)

    @property
    def label(self) -> str:
        return self.delta.label

    def parts(self, name: str) -> StoredParts:
        record = self.records[name]
        return _ReadParts(record.spec(name), self.delta)

    def nbytes(self, name: str | None = None) -> int:
        return 0

    def verify(self, resources: Resources | None = None) -> None:
        """There is nothing stored that could be damaged."""


def delta_patch(delta: Source, before: Mapping[str, TensorSpec], after: Mapping[str, TensorSpec]) -> DeltaPatch:
    """A patch of these differences.

    Args:
        before, after: the tensors that it goes on, and what they become; only rows may differ.
    """
    records = {
        name: Record(
            encoding="dense",
            dtype=after[name].dtype,
            shape=list(after[name].shape),
            parts={},
            base_shape=list(before[name].shape) if before[name].shape != after[name].shape else None,
        )
        for name in delta.specs
    }
    header = PatchHeader(
        schema=SCHEMA,
        requires=sorted(features_of(records)),
        kind="diff",
        method=Method(name="delta"),
        base=Base(),
        tensors=records,
    )
    return DeltaPatch(None, header, header.id(), 1.0, PatchFiles({}), {}, delta=delta)
