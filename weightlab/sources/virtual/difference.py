"""The difference of two sources, computed while it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightlab.sources import Source
from weightlab.sources.virtual.computed import read_values
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec, compute_dtype
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import WorkspaceOfThread


class DifferenceSource:
    """tuned − base of tensors that both have in the same shape, in fp32 (fp64 for fp64 tensors). Closes neither.

    Args:
        factor: what the difference is multiplied by, if not 1.
    """

    def __init__(self, base: Source, tuned: Source, names: Sequence[str], factor: float = 1.0) -> None:
        self._base, self._tuned, self._factor = base, tuned, factor
        self.label: str = f"{tuned.label} - {base.label}"
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = {
            n: TensorSpec(
                n,
                "F64" if compute_dtype(base.specs[n], tuned.specs[n]) == torch.float64 else "F32",
                base.specs[n].shape,
            )
            for n in names
        }
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}

    def read(self, name: str, start: int, out: Tensor) -> None:
        dtype = self.specs[name].type
        assert dtype.torch is not None
        first, deltas = start // dtype.itemsize, out.view(dtype.torch)
        _BUFFERS.depth += 1
        try:
            for begin, end in tiles(deltas.numel()):
                delta = deltas[begin:end].copy_(_values(self._tuned, name, first + begin, first + end))
                base = _BUFFERS.workspace.buffer(f"base {_BUFFERS.depth}", end - begin, dtype.torch)
                delta.sub_(base.copy_(_values(self._base, name, first + begin, first + end)))
                if self._factor != 1.0:
                    delta.mul_(self._factor)
        finally:
            _BUFFERS.depth -= 1

    def close(self) -> None:
        """Nothing of its own to give back."""


class _Buffers(WorkspaceOfThread):
    """Of a tile, one set a thread for all differences; and another for those that are read inside one (`depth`)."""

    depth = 0


_BUFFERS = _Buffers()


def _values(source: Source, name: str, first: int, last: int) -> Tensor:
    size = (last - first) * source.specs[name].type.itemsize
    raw = _BUFFERS.workspace.buffer(f"raw {_BUFFERS.depth}", size, torch.uint8)
    return read_values(source, name, first, last, raw)
