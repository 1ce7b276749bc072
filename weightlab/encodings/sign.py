"""`sign`: one bit an element and a scale per row (BitDelta, arXiv 2402.10193: sign(Δ) · mean|Δ|).

The mean of |Δ| over a row is the scale with the least squared error for given signs. Zero counts as +.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightlab.encodings._base import (
    Buffers,
    DeltaReader,
    Expected,
    Parts,
    Plan,
    Spool,
    Tile,
    as_scales,
    no_arguments,
    part_specs,
    per_row,
    row_blocks,
)
from weightlab.tensors.spec import TensorSpec


class _Sign:
    lossless = False
    example = "sign (1 bit an element and a scale per row)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        return no_arguments("sign", arguments)

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        return len(spec.shape) >= 2 and spec.columns >= 8

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        return {"signs": Expected(("U8",), (-(-spec.numel // 8),)), "scale": Expected(("F32",), (spec.rows,))}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        spec = delta.spec
        sums = torch.zeros(spec.rows, dtype=torch.float64)
        for start, stop, values in delta.tiles():
            for first, last, block in row_blocks(values, start, stop, spec.columns):
                sums[first:last] += block.abs().sum(1, dtype=torch.float64)
        scale = as_scales(sums / max(spec.columns, 1), spec.name, "sign")
        parts = part_specs(signs=("U8", (-(-spec.numel // 8),)), scale=("F32", (spec.rows,)))
        return Plan(parts, {}, small={"scale": scale})

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        negative = np.signbit(tile.delta.numpy()) & (tile.delta.numpy() != 0)
        signs = torch.from_numpy(np.packbits(negative, bitorder="little"))
        approx = torch.empty_like(tile.delta)
        _values(signs, plan.small["scale"], tile.start, tile.stop, spec.columns, approx)
        return {"signs": signs}, approx

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        signs = parts.read("signs", start // 8, -(-stop // 8), buffers)
        _values(signs, parts.whole("scale"), start, stop, parts.spec.columns, out)


def _values(signs: Tensor, scale: Tensor, start: int, stop: int, columns: int, out: Tensor) -> None:
    negative = torch.from_numpy(np.unpackbits(signs.numpy(), count=stop - start, bitorder="little")).view(torch.bool)
    size = per_row(scale, start, stop, columns)
    out.copy_(torch.where(negative, -size, size))


ENCODING = _Sign()
