"""A difference without its share along another difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class ProjectedSource:
    """d − c·a, in fp64, rounded once to fp32 (fp64 for fp64 tensors). Closes neither.

    Args:
        directions: d; a source of fp32 or fp64 tensors. Tensors without a share are d as it is.
        along: a; has the same tensors, in the same dtypes, where there is a share.
        shares: {name: c}.
    """

    def __init__(self, directions: Source, along: Source, shares: Mapping[str, float]) -> None:
        self._directions, self._along, self._shares = directions, along, dict(shares)
        self.label: str = directions.label
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = directions.specs
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}

    def read(self, name: str, start: int, out: Tensor) -> None:
        self._directions.read(name, start, out)
        share = self._shares.get(name, 0.0)
        if share == 0.0:
            return
        along = torch.empty_like(out)
        self._along.read(name, start, along)
        dtype = self.specs[name].type.torch
        assert dtype is not None and self._along.specs[name].dtype == self.specs[name].dtype
        values = out.view(dtype)
        values.copy_(values.double().sub_(along.view(dtype).double().mul_(share)))

    def close(self) -> None:
        """Nothing of its own to give back."""
