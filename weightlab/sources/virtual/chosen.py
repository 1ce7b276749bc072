"""Some of a source's tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class ChosenSource:
    """Only these tensors of another source, without aliases. It does not close the other."""

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._source = source
        self.label: str = source.label
        self.path: Path | None = source.path
        self.specs: Mapping[str, TensorSpec] = {n: source.specs[n] for n in names}
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = source.opaque & self.specs.keys()
        self.codes: Mapping[str, Code] = {n: c for n, c in source.codes.items() if n in self.specs}

    def read(self, name: str, start: int, out: Tensor) -> None:
        self._source.read(name, start, out)

    def close(self) -> None:
        """Nothing of its own to give back."""
