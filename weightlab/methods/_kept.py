"""Differences of which a share of the elements is kept: the largest ones, or some at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from weightlab.methods._base import Deltas
from weightlab.stream.executor import run
from weightlab.tensors.largest import Limit, largest
from weightlab.tensors.order import natural_key
from weightlab.tensors.tiles import TILE, tile_count, tiles
from weightlab.tensors.workspace import Workspace

Choice = Literal["magnitude", "random"]
_TINY = 1e-7
"""Sums below this are not divided by, as in mergekit."""


class Kept:
    """Reads differences with what is dropped from them zero.

    Args:
        densities: the share that is kept, one for each difference; at least one element of a scope, unless 0.
        rescale: what is kept is multiplied until its L1 norm is what that of all was.
        scope: `tensor`: the share is of each tensor; `model`: of all tensors together. So is the norm.
        seed: of a random choice. It depends on the seed, the difference's id, the tensor's name and the place alone.
    """

    def __init__(
        self,
        deltas: Deltas,
        densities: Sequence[float],
        choice: Choice,
        *,
        rescale: bool,
        scope: str = "tensor",
        seed: int = 0,
    ) -> None:
        self._deltas, self._densities, self._seed = deltas, densities, seed
        self._random = choice == "random"
        self._limits: dict[tuple[int, str], tuple[Limit, torch.dtype]] = {}
        self._equals_kept: dict[tuple[int, str], list[int | None]] = {}
        self._factors: dict[tuple[int, str], float] = {}
        groups = []
        for index, source in enumerate(deltas.sources):
            names = sorted((n for n in deltas.specs if n in source.specs), key=natural_key)
            if 0 < densities[index] < 1:
                groups += [(index, names)] if scope == "model" else [(index, [name]) for name in names]

        def size(group: tuple[int, list[str]]) -> int:
            return sum(deltas.specs[name].numel for name in group[1])

        def find(group: tuple[int, list[str]], workspace: Workspace) -> None:
            if size(group):
                self._find(*group, size(group), rescale, workspace)

        run(sorted(groups, key=lambda group: -size(group)), find, deltas.resources)

    def read(self, index: int, name: str, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        """Fills `out` (flat, in the dtype that is computed in) with elements [start, stop) of one difference."""
        density = self._densities[index]
        if density == 0:
            out.zero_()
            return
        self._deltas.read(index, name, start, stop, out, workspace)
        if density == 1:
            return
        self._drop(index, name, start, out)
        factor = self._factors.get((index, name), 1.0)
        if factor != 1.0:
            out.mul_(factor)

    def _find(self, index: int, names: Sequence[str], numel: int, rescale: bool, workspace: Workspace) -> None:
        """Where the limit is, how many equals each tile keeps, and what the kept are multiplied by."""
        dtype = torch.float64 if any(self._deltas.dtype(n) == torch.float64 for n in names) else torch.float32

        def every() -> Iterator[tuple[str, int, Tensor]]:
            for name in names:
                for start, stop in tiles(self._deltas.specs[name].numel):
                    values = workspace.buffer("values", stop - start, self._deltas.dtype(name))
                    self._deltas.read(index, name, start, stop, values, workspace)
                    yield name, start, values.to(dtype)

        if not self._random:
            keep = max(1, int(self._densities[index] * numel))
            limit = largest(lambda: (values for _, _, values in every()), keep, dtype)
            self._limits |= {(index, name): (limit, dtype) for name in names}
            counts = limit.by_tile
            if counts is None:
                counts = [limit.count_equals(values) for _, _, values in every()]
            left, first = limit.equals, 0
            for name in names:
                mine = counts[first : first + tile_count(self._deltas.specs[name].numel)]
                first += len(mine)
                self._equals_kept[index, name] = kept = []
                for count in mine:
                    kept.append(None if limit.every or count <= left else left)
                    left = max(0, left - count)
        if not rescale:
            return
        before = after = 0.0
        for name, start, values in every():
            before += float(values.abs_().sum(dtype=torch.float64))
            self._drop(index, name, start, values)
            after += float(values.sum(dtype=torch.float64))
        if before >= _TINY and after >= _TINY:
            self._factors |= {(index, name): before / after for name in names}

    def _drop(self, index: int, name: str, start: int, values: Tensor) -> None:
        """Zeroes what is dropped of a tile."""
        if self._random:
            chance = torch.from_numpy(self._chance(index, name, start, values.numel()))
            values.mul_(torch.lt(chance, self._densities[index], out=chance))
            return
        limit, dtype = self._limits[index, name]
        wide = values.to(dtype)
        limit.drop(wide, self._equals_kept[index, name][start // TILE])
        if wide is not values:
            values.copy_(wide)

    def _chance(self, index: int, name: str, start: int, numel: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A number from 0 up to 1 for every element."""
        text = f"weightlab dare {self._seed} {self._deltas.ids[index]} {name} {start}"
        key = np.frombuffer(blake3(text.encode()).digest(length=16), dtype="<u8")
        return np.random.Generator(np.random.Philox(key=key)).random(numel, dtype=np.float32)
