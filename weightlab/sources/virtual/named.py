"""A checkpoint of which a tied tensor is shown under another of its names, or under several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class NamedSource:
    """Another source, its stored tensors under chosen names. It does not close the other.

    Args:
        shown: {name: the name in `source.specs` that has the bytes}, every stored tensor at least once.
    """

    def __init__(self, source: Source, shown: Mapping[str, str]) -> None:
        self._source = source
        self.stored = dict(shown)
        self.label: str = source.label
        self.path: Path | None = source.path
        self.specs: Mapping[str, TensorSpec] = {n: replace(source.specs[s], name=n) for n, s in shown.items()}
        first: dict[str, str] = {}
        for name, stored in shown.items():
            first.setdefault(stored, name)
        names = {**source.aliases, **{s: s for s in source.specs}}
        self.aliases: Mapping[str, str] = {n: first[s] for n, s in names.items() if n not in shown}
        self.opaque: frozenset[str] = frozenset(n for n, s in shown.items() if s in source.opaque)
        self.codes: Mapping[str, Code] = {n: source.codes[s] for n, s in shown.items() if s in source.codes}

    def read(self, name: str, start: int, out: Tensor) -> None:
        self._source.read(self.stored[name], start, out)

    def close(self) -> None:
        """Nothing of its own to give back."""
