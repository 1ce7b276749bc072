"""`dense`: every element of the delta, rounded once to a float dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightlab.encodings._base import Buffers, DeltaReader, Expected, Parts, Plan, Spool, Tile, part_specs
from weightlab.errors import RangeError, UsageError
from weightlab.tensors.arithmetic import round_into
from weightlab.tensors.spec import DTYPES, TensorSpec

_STORED = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
STORED = tuple(_STORED.values())
# Without a dtype: that of the tensor; fp8 has too few bits for a difference, so bf16 there.
_DEFAULT = {"F64": "F64", "F32": "F32", "BF16": "BF16", "F16": "F16"}


def stored_dtype(requested: str | None, spec: TensorSpec) -> str:
    """The safetensors dtype that a delta of `spec` is stored in."""
    return _STORED[requested] if requested else _DEFAULT.get(spec.dtype, "BF16")


def parse_dtype(word: str, of: str) -> str:
    """Checks a dtype word of the command line."""
    if word not in _STORED:
        raise UsageError(f"{of}: unknown dtype {word!r}", f"choose from {', '.join(_STORED)}")
    return word


def rounded(delta: Tensor, dtype: str, name: str) -> Tensor:
    """The delta in its stored dtype.

    Raises:
        RangeError: a finite element would become infinite.
    """
    limit = DTYPES[dtype].limit
    if delta.numel():
        low, high = (float(v) for v in torch.aminmax(delta))
        if not (-limit < low and high < limit):  # too large, or NaN or infinity somewhere
            sizes = delta.abs()
            largest = float(torch.where(torch.isfinite(sizes), sizes, 0).max())
            if largest >= limit:
                raise RangeError(
                    "the delta is too large for the dtype that it is stored in",
                    f"store it as {'fp32' if DTYPES[dtype].bits < 32 else 'fp64'}",
                    [f"{name}: reaches {largest:.6g}, {dtype} holds less than {limit:.6g}"],
                )
    stored = torch.empty(delta.shape, dtype=DTYPES[dtype].torch)
    round_into(stored, delta)
    return stored


class _Dense:
    lossless = False
    example = "dense or dense:fp32 (fp64, fp32, bf16, fp16; without one, the tensor's own)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        if len(arguments) > 1:
            raise UsageError(f"dense takes one dtype, got {':'.join(arguments)!r}", "for example dense:bf16")
        return {"dtype": parse_dtype(arguments[0], "dense")} if arguments else {}

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        return True

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        return {"delta": Expected(STORED, spec.shape)}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        dtype = stored_dtype(parameters.get("dtype"), delta.spec)
        return Plan(part_specs(delta=(dtype, delta.spec.shape)), {}, dtype)

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        stored = rounded(tile.delta, plan.state, spec.name)
        return {"delta": stored}, stored.to(tile.delta.dtype)

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        out.copy_(parts.read("delta", start, stop, buffers))


ENCODING = _Dense()
