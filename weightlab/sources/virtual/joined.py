"""Several sources of different tensors as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class JoinedSource:
    """The tensors of all of them; no name may be in two. Closes none of them."""

    def __init__(self, sources: Sequence[Source], label: str) -> None:
        self._owners: dict[str, Source] = {}
        for source in sources:
            twice = self._owners.keys() & source.specs.keys()
            if twice:
                raise AssertionError(f"in two sources: {sorted(twice)}")
            self._owners |= dict.fromkeys(source.specs, source)
        self.label: str = label
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = {n: s.specs[n] for n, s in self._owners.items()}
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset(n for n, s in self._owners.items() if n in s.opaque)
        self.codes: Mapping[str, Code] = {n: s.codes[n] for n, s in self._owners.items() if n in s.codes}

    def read(self, name: str, start: int, out: Tensor) -> None:
        self._owners[name].read(name, start, out)

    def close(self) -> None:
        """Nothing of its own to give back."""
