"""A checkpoint whose tensors go by other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.select import rename
from weightlab.tensors.spec import TensorSpec


class RenamedSource:
    """Another source with prefixes of its names replaced. It does not close the other.

    Args:
        renames: {old prefix: new prefix}.

    Raises:
        NamesMismatchError, UsageError: see `rename`.
    """

    def __init__(self, source: Source, renames: Mapping[str, str]) -> None:
        names = rename([*source.specs, *source.aliases], renames)
        self._source = source
        self._old = {names[name]: name for name in source.specs}
        self.label: str = source.label
        self.path: Path | None = source.path
        self.specs: Mapping[str, TensorSpec] = {n: replace(source.specs[o], name=n) for n, o in self._old.items()}
        self.aliases: Mapping[str, str] = {names[a]: names[n] for a, n in source.aliases.items()}
        self.opaque: frozenset[str] = frozenset(names[name] for name in source.opaque)
        self.codes: Mapping[str, Code] = {
            names[n]: replace(c, module=names[n][: len(names[n]) - len(n) + len(c.module)])
            for n, c in source.codes.items()
        }

    def read(self, name: str, start: int, out: Tensor) -> None:
        self._source.read(self._old[name], start, out)

    def close(self) -> None:
        """Nothing of its own to give back."""
