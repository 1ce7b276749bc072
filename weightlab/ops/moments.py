"""Norms of many tensors, streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlab.files.digest import Turns
from weightlab.sources import Source
from weightlab.stream.executor import Progress, Resources, run
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace


@dataclass(slots=True)
class Moments:
    """Norms and counts over elements, in fp64. NaN and infinities are counted and left out."""

    count: int = 0
    norm: float = 0.0
    largest: float = 0.0
    changed: int = 0
    nonfinite: int = 0

    def add(self, other: Moments) -> None:
        self.count += other.count
        self.norm = math.hypot(self.norm, other.norm)  # squares would leave the range of fp64
        self.largest = max(self.largest, other.largest)
        self.changed += other.changed
        self.nonfinite += other.nonfinite

    @property
    def rms(self) -> float:
        return self.norm / math.sqrt(self.count) if self.count else 0.0


def moments(source: Source, names: Sequence[str], resources: Resources) -> dict[str, Moments]:
    """Norms of float tensors, tile by tile; tiles are added in order, so the result does not depend on the threads."""
    turns = Turns()
    found = {name: Moments() for name in names}
    progress = Progress(sum(source.specs[n].nbytes for n in names), resources.progress)

    def tasks() -> Iterator[tuple[int, str, int, int]]:
        index = 0
        for name in names:
            for start, stop in tiles(source.specs[name].numel):
                yield index, name, start, stop
                index += 1

    def work(task: tuple[int, str, int, int], workspace: Workspace) -> None:
        index, name, start, stop = task
        dtype = source.specs[name].type
        assert dtype.torch is not None
        raw = workspace.buffer("moments", (stop - start) * dtype.itemsize, torch.uint8)
        source.read(name, start * dtype.itemsize, raw)
        part = _moments(raw.view(dtype.torch), workspace)
        with turns.turn(index):
            found[name].add(part)
        progress.advance(raw.numel())

    run(tasks(), work, resources, turns)
    return found


def _moments(stored: Tensor, workspace: Workspace) -> Moments:
    values = workspace.buffer("as fp64", stored.numel(), torch.float64)
    values.copy_(stored)
    bad = ~torch.isfinite(values)
    nonfinite = int(bad.sum())
    if nonfinite:
        values[bad] = 0.0
    low, high = (float(v) for v in torch.aminmax(values))
    largest = max(-low, high)
    changed = int(torch.count_nonzero(values)) + nonfinite
    scale = 1.0 if 1e-150 < largest < 1e150 else largest or 1.0
    norm = scale * float(torch.linalg.vector_norm(values.div_(scale) if scale != 1.0 else values))
    return Moments(stored.numel(), norm, largest, changed, nonfinite)
