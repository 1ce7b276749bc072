"""The difference of two sources, computed while it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightlab.sources import Source
from weightlab.sources.virtual.computed import read_values
from weightlab.tensors.spec import TensorSpec, compute_dtype
from weightlab.tensors.workspace import Workspace, WorkspaceOfThread


class DifferenceSource:
    """tuned − base of tensors that both have in the same shape, in fp32 (fp64 for fp64 tensors). Closes neither.

    Args:
        factor: what the difference is multiplied by, if not 1.
    """

    def __init__(self, base: Source, tuned: Source, names: Sequence[str], factor: float = 1.0) -> None:
        self._base, self._tuned, self._factor = base, tuned, factor
        self._own = WorkspaceOfThread()
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

    def read(self, name: str, start: int, out: Tensor) -> None:
        dtype = self.specs[name].type
        assert dtype.torch is not None
        first, count = start // dtype.itemsize, out.numel() // dtype.itemsize
        delta, workspace = out.view(dtype.torch), self._own.workspace
        delta.copy_(_values(self._tuned, name, first, count, workspace))
        base = workspace.buffer("base", count, dtype.torch)
        delta.sub_(base.copy_(_values(self._base, name, first, count, workspace)))
        if self._factor != 1.0:
            delta.mul_(self._factor)

    def close(self) -> None:
        """Nothing of its own to give back."""


def _values(source: Source, name: str, first: int, count: int, workspace: Workspace) -> Tensor:
    raw = workspace.buffer("raw", count * source.specs[name].type.itemsize, torch.uint8)
    return read_values(source, name, first, first + count, raw)
