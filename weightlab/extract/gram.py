"""Inner products of several sets of tensors, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from weightlab.errors import NonFiniteError
from weightlab.files.digest import Turns
from weightlab.sources import Source
from weightlab.stream.executor import Progress, Resources, run
from weightlab.tensors.tiles import TILE, tiles
from weightlab.tensors.workspace import Workspace

Gram = NDArray[np.float64]
_PER_SOURCE = TILE * 20  # bytes a thread: a tile in fp64, and what a source of patches computes it in


def gram(sources: Sequence[Source], names: Sequence[str], resources: Resources) -> dict[str, Gram]:
    """For each tensor the matrix of inner products ⟨source i, source j⟩, in fp64: {name: [sources, sources]}.

    Tiles are summed in their order, so the result does not depend on the number of threads.

    Args:
        sources: of float tensors; one that lacks a tensor counts as zero there. Shapes agree.

    Raises:
        UsageError: so many sources do not fit the memory that is given.
        NonFiniteError: lists the tensors whose products are not finite.
    """
    turns = Turns()
    found = {name: np.zeros((len(sources), len(sources))) for name in names}
    holders = {name: [i for i, s in enumerate(sources) if name in s.specs] for name in names}
    progress = Progress(sum(sources[i].specs[n].nbytes for n in names for i in holders[n]), resources.progress)

    def tasks() -> Iterator[tuple[int, str, int, int]]:
        index = 0
        for name in names:
            if not holders[name]:
                continue
            for start, stop in tiles(sources[holders[name][0]].specs[name].numel):
                yield index, name, start, stop
                index += 1

    def work(task: tuple[int, str, int, int], workspace: Workspace) -> None:
        index, name, start, stop = task
        rows = workspace.buffer("rows", len(sources) * (stop - start), torch.float64).view(len(sources), stop - start)
        read = 0
        for i in holders[name]:
            dtype = sources[i].specs[name].type
            assert dtype.torch is not None
            raw = workspace.buffer("gram", (stop - start) * dtype.itemsize, torch.uint8)
            sources[i].read(name, start * dtype.itemsize, raw)
            rows[i].copy_(raw.view(dtype.torch))
            read += raw.numel()
        products = np.zeros((len(sources), len(sources)))
        for k, i in enumerate(holders[name]):
            for j in holders[name][k:]:
                products[i, j] = products[j, i] = float(torch.dot(rows[i], rows[j]))
        with turns.turn(index):
            found[name] += products
        progress.advance(read)

    run(tasks(), work, resources, turns, more=len(sources) * _PER_SOURCE)
    wrong = [name for name, products in found.items() if not np.isfinite(products).all()]
    if wrong:
        raise NonFiniteError("NaN or infinity in the weights", "exclude these tensors", wrong)
    return found


def joined(products: Mapping[str, Gram], names: Sequence[str]) -> Gram:
    """The inner products over several tensors together; there is at least one product."""
    return sum((products[name] for name in names), start=np.zeros_like(next(iter(products.values()))))


def cosine(products: Gram, i: int, j: int) -> float:
    """The cosine of two of them; 0 where one is zero."""
    norms = math.sqrt(products[i, i]) * math.sqrt(products[j, j])
    return float(products[i, j]) / norms if norms else 0.0
