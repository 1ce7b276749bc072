"""Tensors of zeros: what a difference is taken against when the difference itself is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class ZeroSource:
    """Zeros of given specs."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.label: str = "zero"
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = dict(specs)
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.zero_()

    def close(self) -> None:
        """Nothing to give back."""
