"""How the lossless codec reads a dtype: words, their order, their exponents; and the memory that it works in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from weightlab.tensors.spec import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]
_MANTISSA = {"F64": 52, "F32": 23, "C64": 23, "BF16": 7, "F16": 10}
_MANTISSA |= {"F8_E4M3": 3, "F8_E5M2": 2, "F8_E4M3FNUZ": 3, "F8_E5M2FNUZ": 2}


class Layout:
    """How a dtype is read: words of `bits` bits with `mantissa` of them below the exponent; integers have none."""

    def __init__(self, dtype: str) -> None:
        self.bits = 32 if dtype == "C64" else DTYPES[dtype].itemsize * 8
        self.size = self.bits // 8
        self.word, self.signed = np.dtype(f"<u{self.size}"), np.dtype(f"<i{self.size}")
        self.is_float = dtype in _MANTISSA
        self.mantissa = _MANTISSA.get(dtype, 0)
        # Predicted lengths are below this; in the last group the base says little.
        self.lengths = self.mantissa + 2 if self.is_float else self.bits + 1
        # A group is sorted by this many upper bits of the base's mantissa: weight decay moves weights in proportion.
        self.context = min(self.mantissa // 4, 5)
        # From this length on, the tuned pattern itself is coded, as it says more than the difference.
        self.direct = self.mantissa - 1 if self.is_float else self.bits + 1


layout_of = cache(Layout)


class _Scratch(threading.local):
    """Arrays of one thread by name, used again for every block: to get new memory takes longer than to work in it.

    Some tens of bytes for each element of the largest block stay with the thread.
    """

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def __call__(self, name: str, count: int, dtype: Any) -> Array:
        """`count` elements of any content, until the next call with this name."""
        dtype = np.dtype(dtype)
        size = count * dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = np.empty(size, dtype=np.uint8)
        return held[:size].view(dtype)


scratch = _Scratch()


def ordered(bits: Array, layout: Layout, out: Array) -> Array:
    """Sign and magnitude as integers in two's complement, ordered as the floats; its own inverse. Fills `out`."""
    if layout.is_float:
        np.right_shift(bits.view(layout.signed), layout.bits - 1, out=out.view(layout.signed))
        out >>= 1
        out ^= bits
    else:
        np.copyto(out, bits)
    return out


def exponents_of(bits: Array, layout: Layout, out: Array) -> Array:
    """The exponent fields; zero for integers. Fills `out` (int16)."""
    if layout.is_float:
        unsigned = np.left_shift(bits, 1, out=scratch("unsigned", len(bits), layout.word))
        np.right_shift(unsigned, layout.mantissa + 1, out=out, casting="unsafe")
    else:
        out.fill(0)
    return out


def taken(values: Array, places: Array, out: Array | None = None) -> Array:
    """The values at these places, all of which must exist: so "clip", which is the fastest, clips nothing."""
    found: Array = values.take(places, mode="clip", out=out)
    return found


def direct(sides: Sequence[Array], noise: int, layout: Layout) -> Array:
    """The tuned patterns less the expected exponents, from (base, tuned, centres).

    The sign, as same as or other than the base's, moves from the top to just above the noise, so that it is in the
    symbol: the larger the base, the likelier it is the same.
    """
    (before, after, centres), last = sides, layout.bits - 1
    magnitudes = after & layout.word.type(2**last - 1)
    values: Array = (magnitudes >> noise) << 1
    values |= (before ^ after) >> last
    values <<= noise
    values |= magnitudes & layout.word.type(2**noise - 1)
    values -= centres
    return values.view(layout.signed)


def undirect(before: Array, values: Array, centres: Array, noise: int, layout: Layout) -> Array:
    """The tuned patterns again, from what `direct` made of them."""
    last = layout.bits - 1
    values = values + centres
    after: Array = (values >> (noise + 1)) << noise
    after |= values & layout.word.type(2**noise - 1)
    after |= ((values >> noise) << last) ^ (before & layout.word.type(2**last))
    return after
