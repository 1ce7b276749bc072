"""The difference of two embeddings in the order of a third one's rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weightlab.sources import Source
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.vocabulary import RowPlan


class RowsSource:
    """factor·(tuned − base) row by row; a row that only the tune has gets what makes it the tune's. Closes nothing.

    Args:
        names: {name here: names in (base, tuned, target)}.
        factor: rounded to fp32, and multiplied as a patch's scale is.
    """

    def __init__(
        self,
        sources: tuple[Source, Source, Source],
        names: Mapping[str, tuple[str, ...]],
        plan: RowPlan,
        factor: float,
    ) -> None:
        self._sources, self._names, self._plan = sources, dict(names), plan
        self._factor = round_scale(factor)
        self._runs = _runs(plan)
        self.label: str = f"{sources[1].label} - {sources[0].label}"
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, "F32", (plan.rows, *sources[2].specs[names_[2]].shape[1:]))
            for name, names_ in names.items()
        }
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}

    def read(self, name: str, start: int, out: Tensor) -> None:
        columns = max(1, self.specs[name].numel // self._plan.rows)
        values = out.view(torch.float32)
        first, done = start // 4, 0
        while done < values.numel():
            row, column = divmod(first + done, columns)
            last = min(self._runs[row], (first + values.numel() - 1) // columns + 1)
            count = min((last - row) * columns - column, values.numel() - done)
            self._together(name, row, column, values[done : done + count])
            done += count

    def _together(self, name: str, row: int, column: int, out: Tensor) -> None:
        tuned, base = int(self._plan.tuned[row]), int(self._plan.base[row])
        if tuned < 0:
            out.zero_()
            return
        of_base, of_tuned, of_target = self._names[name]
        out.copy_(self._values(1, of_tuned, tuned, column, out.numel()))
        if base >= 0:
            out.sub_(self._values(0, of_base, base, column, out.numel()))
            if self._factor != 1.0:
                out.mul_(self._factor)
        elif row < self._sources[2].specs[of_target].shape[0]:  # a row of padding becomes the tune's
            out.sub_(self._values(2, of_target, row, column, out.numel()))

    def _values(self, which: int, name: str, row: int, column: int, count: int) -> Tensor:
        source = self._sources[which]
        spec = source.specs[name]
        size, columns = spec.type.itemsize, max(1, spec.numel // spec.shape[0])
        assert spec.type.torch is not None
        raw = torch.empty(count * size, dtype=torch.uint8)
        source.read(name, (row * columns + column) * size, raw)
        return raw.view(spec.type.torch).to(torch.float32)

    def close(self) -> None:
        """Nothing of its own to give back."""


def _runs(plan: RowPlan) -> list[int]:
    """For each row the end of the run that it is in: rows that are read together, because they lie together."""
    one, other = plan.tuned, plan.base
    together = (np.diff(one) == (one[1:] >= 0)) & (np.diff(other) == (other[1:] >= 0))
    together &= (one[1:] >= 0) == (one[:-1] >= 0)
    together &= (other[1:] >= 0) == (other[:-1] >= 0)
    inside = np.arange(1, plan.rows) < plan.target_rows  # padding that becomes the tune's, and rows beyond it
    together &= inside | (np.arange(plan.rows - 1) >= plan.target_rows)
    ends = np.flatnonzero(~together) + 1
    found: list[int] = np.append(ends, plan.rows)[np.searchsorted(ends, np.arange(plan.rows), side="right")].tolist()
    return found
