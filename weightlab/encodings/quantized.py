"""`quantized`: 2 to 8 bits an element, really packed; levels linear, logarithmic or through tanh.

The three kinds of levels are those of Robust Weight Signatures (arXiv 2302.12480, authors' code), with two
differences: zero is always a level, so an element that did not change decodes to exactly zero, and logarithmic levels
reach a fixed number of octaves below the largest, so an exact zero does not become minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    part_specs,
    per_row,
    row_blocks,
)
from weightlab.encodings._packing import pack, packed_bytes, unpack
from weightlab.encodings.dense import stored_dtype
from weightlab.errors import IntegrityError, UsageError
from weightlab.tensors.spec import DTYPES, TensorSpec

_LEVELS = ("linear", "log", "tanh")
_SCOPES = ("tensor", "channel")
_USAGE = "write quantized:BITS[:linear|log|tanh][:tensor|channel], BITS from 2 to 8"


class _Quantized:
    lossless = False
    example = "quantized:4 or quantized:4:log:channel (2 to 8 bits; linear, log, tanh; per tensor or channel)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        words = list(arguments)
        if not words or not words[0].isdecimal() or not 2 <= int(words[0]) <= 8:
            raise UsageError(f"quantized needs its bits, got {':'.join(words)!r}", _USAGE)
        rest = words[1:]
        levels = [w for w in rest if w in _LEVELS]
        scopes = [w for w in rest if w in _SCOPES]
        if len(levels) > 1 or len(scopes) > 1 or len(levels) + len(scopes) != len(rest):
            raise UsageError(f"quantized does not understand {':'.join(rest)!r}", _USAGE)
        return {"bits": int(words[0]), "levels": (levels or ["linear"])[0], "scope": (scopes or ["tensor"])[0]}

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        parts = self.expected(spec, parameters).values()
        size = sum(math.prod(d or 0 for d in part.shape) * DTYPES[part.dtypes[0]].itemsize for part in parts)
        return size < spec.numel * DTYPES[stored_dtype(None, spec)].itemsize

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        bits, levels, scope = parameters["bits"], parameters["levels"], parameters["scope"]
        if type(bits) is not int or not 2 <= bits <= 8 or levels not in _LEVELS or scope not in _SCOPES:
            raise ValueError(f"bits {bits}, levels {levels}, scope {scope}")
        rows = spec.rows if scope == "channel" else 1
        codes = {"codes": Expected(("U8",), (packed_bytes(spec.numel, bits),))}
        if levels == "linear":
            return codes | {"step": Expected(("F32",), (rows,)), "zero": Expected(("U8",), (rows,))}
        return codes | {"scale": Expected(("F32",), (rows,)), "book": Expected(("F32",), (2**bits - 1,))}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        spec, bits = delta.spec, int(parameters["bits"])
        low, high = _ranges(delta, spec.rows if parameters["scope"] == "channel" else 1)
        kept = {"bits": bits, "levels": parameters["levels"], "scope": parameters["scope"]}
        if parameters["levels"] == "linear":
            top = 2**bits - 1
            step = as_scales((high - low) / top, spec.name, "quantized")
            zero = torch.where(step > 0, torch.round(-low / step), 0.0).clamp(0, top)
            # The outermost levels lie up to half a step beyond the range, and may not lie beyond fp32.
            as_scales(torch.maximum(zero, top - zero) * step, spec.name, "quantized")
            small = {"step": step, "zero": zero.to(torch.uint8)}
        else:
            scale = as_scales(torch.maximum(-low, high), spec.name, "quantized")
            largest = float(scale.max()) if scale.numel() else 0.0
            small = {"scale": scale, "book": _book(parameters["levels"], bits, largest)}
        parts = part_specs(
            codes=("U8", (packed_bytes(spec.numel, bits),)),
            **{p: ("U8" if v.dtype == torch.uint8 else "F32", tuple(v.shape)) for p, v in small.items()},
        )
        return Plan(parts, kept, small=small)

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        small = plan.small
        bits = plan.parameters["bits"]
        if plan.parameters["levels"] == "linear":
            step = per_row(small["step"], tile.start, tile.stop, spec.columns)
            zero = per_row(small["zero"], tile.start, tile.stop, spec.columns)
            codes = torch.round(tile.delta / step).add_(zero).nan_to_num_(0.0).clamp_(0, 2**bits - 1).to(torch.uint8)
            codes = torch.where(step > 0, codes, zero)
        else:
            scale = per_row(small["scale"], tile.start, tile.stop, spec.columns)
            book = small["book"]
            unit = (tile.delta / scale).nan_to_num_(0.0).to(torch.float32)
            codes = torch.bucketize(unit, (book[1:] + book[:-1]) / 2).to(torch.uint8)
            codes = torch.where(tile.delta == 0, (len(book) - 1) // 2, codes)
        approx = torch.empty_like(tile.delta)
        _values(codes, plan.parameters["levels"], small, tile.start, tile.stop, spec.columns, approx)
        return {"codes": pack(codes, bits)}, approx

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        bits, levels = parts.parameters["bits"], parts.parameters["levels"]
        first = start // 8 * bits
        packed = parts.read("codes", first, first + packed_bytes(stop - start, bits), buffers)
        codes = unpack(packed, bits, stop - start)
        small = {p: parts.whole(p) for p in (("step", "zero") if levels == "linear" else ("scale", "book"))}
        if levels != "linear" and codes.numel() and int(codes.max()) >= small["book"].numel():
            raise IntegrityError(f"{parts.spec.name}: a code points outside its code book", "get the patch again")
        _values(codes, levels, small, start, stop, parts.spec.columns, out)


def _values(
    codes: Tensor, levels: str, small: Mapping[str, Tensor], start: int, stop: int, columns: int, out: Tensor
) -> None:
    """The delta that codes stand for: separate subtract and multiply in fp32."""
    if levels == "linear":
        zero = per_row(small["zero"], start, stop, columns)
        values = codes.to(torch.float32).sub_(zero).mul_(per_row(small["step"], start, stop, columns))
    else:
        values = small["book"][codes.to(torch.int64)].mul_(per_row(small["scale"], start, stop, columns))
    out.copy_(values)


def _ranges(delta: DeltaReader, rows: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each row (or of the tensor, rows = 1), zero included; fp64."""
    low, high = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    columns = delta.spec.columns if rows > 1 else delta.spec.numel
    for start, stop, values in delta.tiles():
        for first, last, block in row_blocks(values, start, stop, columns):
            low[first:last] = torch.minimum(low[first:last], block.amin(1))
            high[first:last] = torch.maximum(high[first:last], block.amax(1))
    return low, high


def _book(levels: str, bits: int, largest: float) -> Tensor:
    """2**bits − 1 levels in [−1, 1], ascending, zero in the middle; to be multiplied by the largest magnitude."""
    half = 2 ** (bits - 1) - 1
    if levels == "log":
        octaves = 2.0 * (bits - 1)
        positive = [2.0 ** (-octaves * (half - i) / max(half, 1)) for i in range(1, half + 1)]
    else:
        reach = math.tanh(largest)
        unit = [math.atanh(reach * i / half) if reach < 1 else i / half for i in range(1, half + 1)]
        positive = [u / unit[-1] if unit[-1] else (i + 1) / half for i, u in enumerate(unit)]
    return torch.tensor([-p for p in reversed(positive)] + [0.0] + positive, dtype=torch.float32)


ENCODING = _Quantized()
