"""The arithmetic of a tile, by the rules that make results the same bits on every machine.

Only separate IEEE multiply, add and convert: no fused multiply-add, no `alpha=`, no matmul. Sums are in fp32 (fp64
for fp64 tensors) and rounded once to the storage dtype. Elements whose every term is zero keep their bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightlab.errors import UsageError
from weightlab.tensors.spec import BY_TORCH, DType

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = _SIGNED | {1: torch.uint8}
_CANONICAL_NAN = {
    "F64": 0x7FF8000000000000,
    "F32": 0x7FC00000,
    "F16": 0x7E00,
    "BF16": 0x7FC0,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7E,
    "F8_E4M3FNUZ": 0x80,
    "F8_E5M2FNUZ": 0x80,
}


def round_scale(scale: float) -> float:
    """The scale as arithmetic uses it: rounded to fp32 once.

    Raises:
        UsageError: it is no finite number of fp32.
    """
    with np.errstate(over="ignore"):
        rounded = float(np.float32(scale))
    if not math.isfinite(rounded):
        raise UsageError(f"{scale:g} is no scale", "give a finite number, for example 0.5 or -1")
    return rounded


def bits(tensor: Tensor) -> Tensor:
    """The same memory, seen as integers of the same width."""
    return tensor.view(_BITS[tensor.element_size()])


def raw_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor in memory, flat; the same memory where it is contiguous.

    Tensors of one element count as contiguous whatever their stride is, which views of another width mind in some
    versions of torch.
    """
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    raw: np.ndarray[Any, np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return raw


@dataclass(slots=True)
class Faults:
    """What went wrong in a tile. `finite`: nothing, and every element of the result is finite."""

    input_nonfinite: bool = False
    delta_nonfinite: bool = False
    overflow: bool = False
    finite: bool = False


def is_finite(values: Tensor) -> bool:
    """Whether every element is finite; one pass, no temporary. `values`: float, at least one element."""
    low, high = torch.aminmax(values if values.element_size() > 1 else values.float())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def round_into(out: Tensor, values: Tensor) -> None:
    """`out = values` in the dtype of `out`, rounded once to the nearest, ties to even.

    torch goes from fp64 to the narrow dtypes by way of fp32, which rounds twice: a value that fp32 rounds to the middle
    between two neighbours lands on the wrong one. Rounded to odd on the way (what fp32 cannot hold gets the last bit
    set), no middle arises that was none (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

    Args:
        values: fp32 or fp64, flat.
    """
    if values.dtype != torch.float64 or out.dtype in (torch.float64, torch.float32):
        out.copy_(values)
        return
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    beyond = back.abs() > values.abs()  # rounded away from zero; so is what became infinite
    pattern = near.view(torch.int32)
    pattern -= beyond.to(torch.int32)
    pattern |= (back != values).to(torch.int32) & torch.isfinite(values).to(torch.int32)
    out.copy_(near)


def add_terms(
    base: Tensor,
    terms: Sequence[tuple[float, Tensor]],
    out: Tensor,
    *,
    work: Tensor,
    product: Tensor,
    changed: Tensor,
    changed_too: Tensor,
    allow_nonfinite: bool = False,
) -> Faults:
    """`out = round(base + sum of scale * delta)`, terms in the order given.

    Args:
        base: flat tile in its storage dtype (a float dtype).
        terms: (scale, delta) pairs; delta in the compute dtype (fp32 or fp64), flat, not modified.
        out: flat tile of the storage dtype; receives the result. May not overlap `base`.
        work, product: flat buffers in the compute dtype, of the tile's size.
        changed, changed_too: bool buffers of the tile's size.
        allow_nonfinite: let NaN and infinities through (NaN is written canonical) instead of reporting them.

    Returns:
        what is wrong with the tile; when anything is, `out` must not be used.
    """
    work.copy_(base)
    for scale, delta in terms:
        if scale == 1.0:
            work.add_(delta)
        else:
            torch.mul(delta, scale, out=product)
            work.add_(product)
    dtype = BY_TORCH[base.dtype]
    faults = _inspect(base, terms, work, dtype, allow_nonfinite)
    round_into(out, work)
    if faults.finite and not _has_negative_zero(base):
        return faults  # adding a zero has given back the very bits
    if allow_nonfinite:
        bits(out)[torch.isnan(work)] = _as_signed(_CANONICAL_NAN[dtype.name], dtype)
    changed.fill_(False)
    for _, delta in terms:
        torch.ne(delta, 0, out=changed_too)
        torch.logical_or(changed, changed_too, out=changed)
    torch.where(changed, bits(out), bits(base), out=bits(out))
    return faults


def _has_negative_zero(values: Tensor) -> bool:
    """Whether any element is -0.0 (as a signed integer of the same width, the smallest there is)."""
    signed = values.view(_SIGNED[values.element_size()])
    return int(signed.amin()) == torch.iinfo(signed.dtype).min


def _inspect(
    base: Tensor, terms: Sequence[tuple[float, Tensor]], result: Tensor, dtype: DType, allow_nonfinite: bool
) -> Faults:
    low, high = (float(v) for v in torch.aminmax(result))
    if -dtype.limit < low and high < dtype.limit:  # false for NaN too
        return Faults(finite=True)
    base_bad = not is_finite(base)
    delta_bad = not all(is_finite(delta) for _, delta in terms)
    if not (base_bad or delta_bad):
        return Faults(overflow=True)
    if not allow_nonfinite:
        return Faults(input_nonfinite=base_bad, delta_nonfinite=delta_bad)
    sane = torch.isfinite(base.to(result.dtype))
    for _, delta in terms:
        sane &= torch.isfinite(delta)
    return Faults(overflow=bool(((result.abs() >= dtype.limit) & sane).any()))


def _as_signed(pattern: int, dtype: DType) -> int:
    return pattern - (1 << dtype.bits) if dtype.bits > 8 and pattern >> (dtype.bits - 1) else pattern
