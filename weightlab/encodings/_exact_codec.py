"""The lossless codec of one block: the elements of a tuned tensor, given the same elements of the base.

Integers alone decide, so the bytes are the same on every processor:

1. The bit patterns of floats become integers in the order of the floats; what is stored is the difference of the two,
   modulo the word (FM-Delta, NeurIPS 2024). Its length in bits depends on how far the weights nearby moved and, floats
   being spaced by their exponent, on the base's exponent.
2. So the encoder notes for each run of `_RUN` elements how far it moved (its class; runs that did not are left out).
   Class and base exponent predict the length of every difference, to both sides, and the elements are sorted by it.
3. The elements of one predicted length are a group. Its rule says how many low bits are noise and whether a mask tells
   the unchanged elements. Where the base is small beside the change, the tuned pattern itself is coded.
4. Noise is stored as it is (ZipNN, arXiv 2411.05239). The byte above it, the symbol, holds all structure and goes
   through the Huffman coder of zstd, with tables of its own for each group. What it cannot hold goes to `high`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from weightlab.tensors.spec import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]
PLANES = ("rules", "classes", "mask", "symbols", "low", "high")
_MANTISSA = {"F64": 52, "F32": 23, "C64": 23, "BF16": 7, "F16": 10}
_MANTISSA |= {"F8_E4M3": 3, "F8_E5M2": 2, "F8_E4M3FNUZ": 3, "F8_E5M2FNUZ": 2}
_RUN = 128
_SAMPLE = 1024  # elements of a group that its rule is chosen from
_MASKED, _FAR = 16, 32  # flags of a rule; its lowest four bits are a quarter of the bits of noise
_INDEX = 20  # bits of a place in a block: 2**19 complex numbers are 2**20 words
_PLACES = np.arange(2**_INDEX, dtype=np.uint32)


class _Layout:
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


def split(base: Array, tuned: Array, dtype: str) -> list[list[Array]]:
    """Splits the change of a block of 1 to 2**19 elements, at least one of which changed, into `PLANES`.

    Args:
        base, tuned: the bytes of the same elements, uint8 and contiguous, little-endian.

    Returns:
        each plane as pieces (uint8) of unlike statistics.
    """
    layout = _Layout(dtype)
    before, after = base.view(layout.word), tuned.view(layout.word)
    difference = _ordered(after, layout)
    difference -= _ordered(before, layout)
    exponents = _exponents(before, layout)
    largest, classes = _classes(exponents, after, difference.view(layout.signed), layout)
    if not classes.all():
        kept = np.repeat(classes != 0, _RUN)[: len(before)]
        before, after, difference, exponents = before[kept], after[kept], difference[kept], exponents[kept]
    order, groups = _arrange(before, exponents, largest, classes, layout)
    difference = difference[order].view(layout.signed)
    rules = bytearray(largest.to_bytes(2, "little"))
    mask, symbols, low, high = ([classes[:0]] for _ in range(4))
    for length, start, stop in groups:
        values = difference[start:stop]
        if length >= layout.direct:
            chosen = order[start:stop]
            sides = [before[chosen], after[chosen], _centres(chosen, largest, classes, layout)]
            rule = _rule(_direct([side[:: -(-len(chosen) // _SAMPLE)] for side in sides], 0, layout)) & 15
            values = _direct(sides, 4 * rule, layout)
        else:
            rule = _rule(values)
        if rule & _MASKED:
            changed = values != 0
            mask.append(np.packbits(changed, bitorder="little"))
            values = values[changed]
        noise = 4 * (rule & 15)
        upper = values >> noise
        symbol = upper.astype(np.int8)
        symbols.append(symbol.view(np.uint8))
        octets = values.view(np.uint8).reshape(-1, layout.size)
        low.extend(octets[:, index] for index in range(noise // 8))
        if noise % 8:
            nibbles = octets[:, noise // 8] & 15
            low.append(nibbles[::2].copy())
            low[-1][: len(nibbles) // 2] |= nibbles[1::2] << 4
        if len(upper) and (int(upper.min()) < -128 or int(upper.max()) > 127):
            rule |= _FAR
            rest = ((upper - symbol) >> 8).view(np.uint8).reshape(-1, layout.size)
            high.extend(rest[:, index] for index in range((layout.bits - noise - 1) // 8))
        rules.append(rule)
    joined = [[np.concatenate(pieces)] for pieces in (mask, low, high)]
    return [[np.frombuffer(rules, dtype=np.uint8)], [classes], joined[0], symbols, *joined[1:]]


def join(base: Array, head: Array, read: Callable[[str, int], Callable[[int], Array]], dtype: str) -> Array:
    """The tuned bit patterns of one block, flat, as unsigned integers (of half the dtype's width for complex numbers).

    Args:
        base: the bytes of the base's elements, uint8 and contiguous.
        head: the plane "rules".
        read: opens another of `PLANES`, which must have so many bytes; gives a function that takes the next ones.

    Raises:
        ValueError: the planes make no sense.
    """
    layout = _Layout(dtype)
    before = base.view(layout.word)
    largest, rules = int.from_bytes(head[:2].tobytes(), "little"), head[2:].tolist()
    runs = -(-len(before) // _RUN)
    classes = read("classes", runs)(runs)
    kept = np.repeat(classes != 0, _RUN)[: len(before)]
    base = before if classes.all() else before[kept]
    order, groups = _arrange(base, _exponents(base, layout), largest, classes, layout)
    if len(rules) != len(groups) or any(4 * (rule & 15) > layout.bits - 8 or rule >= 2 * _FAR for rule in rules):
        raise ValueError("the rules do not fit the base")
    counts = [stop - start for _, start, stop in groups]
    masked = [index for index, rule in enumerate(rules) if rule & _MASKED]
    take_mask = read("mask", sum(-(-counts[index] // 8) for index in masked))
    masks: dict[int, Array] = {}
    for index in masked:
        octets = take_mask(-(-counts[index] // 8))
        masks[index] = np.unpackbits(octets, count=counts[index], bitorder="little").view(np.bool_)
        counts[index] = int(np.count_nonzero(masks[index]))
    spans = [(layout.bits - 4 * (rule & 15) - 1) // 8 if rule & _FAR else 0 for rule in rules]
    parts = [(count, 4 * (rule & 15), span) for count, rule, span in zip(counts, rules, spans, strict=True)]
    take_symbols = read("symbols", sum(counts))
    take_low = read("low", sum(count * (noise // 8) + noise % 8 // 4 * (-(-count // 2)) for count, noise, _ in parts))
    take_high = read("high", sum(count * span for count, _, span in parts))
    found = _ordered(base, layout)[order]
    for index, ((length, start, stop), (count, noise, span)) in enumerate(zip(groups, parts, strict=True)):
        values = take_symbols(count).view(np.int8).astype(layout.signed).view(layout.word)
        for place in range(span):
            values += take_high(count).astype(layout.word) << (8 * place + 8)
        values <<= noise
        octets = values.view(np.uint8).reshape(-1, layout.size)
        for place in range(noise // 8):
            octets[:, place] = take_low(count)
        if noise % 8:
            nibbles = take_low(-(-count // 2))
            octets[::2, noise // 8] |= nibbles & 15
            octets[1::2, noise // 8] |= nibbles[: count // 2] >> 4
        if index in masks:
            spread = np.zeros(stop - start, dtype=layout.word)
            spread[masks[index]] = values
            values = spread
        if length >= layout.direct:
            chosen = order[start:stop]
            centres = _centres(chosen, largest, classes, layout)
            found[start:stop] = _ordered(_undirect(base[chosen], values, centres, noise, layout), layout)
        else:
            found[start:stop] += values
    result = before.copy()
    result[order if base is before else np.flatnonzero(kept)[order]] = _ordered(found, layout)
    return result


def _ordered(bits: Array, layout: _Layout) -> Array:
    """A copy in which sign and magnitude are integers in two's complement, ordered as the floats; its own inverse."""
    if not layout.is_float:
        return bits.copy()
    ordered: Array = (bits.view(layout.signed) >> (layout.bits - 1)).view(layout.word)
    ordered >>= 1
    ordered ^= bits
    return ordered


def _exponents(bits: Array, layout: _Layout) -> Array:
    """The exponent fields as int16; zero for integers."""
    if not layout.is_float:
        return np.zeros(len(bits), dtype=np.int16)
    return ((bits << 1) >> (layout.mantissa + 1)).astype(np.int16)


def _classes(exponents: Array, after: Array, difference: Array, layout: _Layout) -> tuple[int, Array]:
    """How far each run moved: (the largest size, classes as uint8).

    The size of an element is the base's exponent plus the length of the difference in bits; where that is beyond an
    exponent's range, the larger of both exponents plus `mantissa` + 2. Class c > 0 stands for a size of
    `largest` - (c - 1) / 2, from the mean of the powers of two; class 0 for a run without any difference.
    """
    wide = layout.bits == 64
    powers: Array = difference.astype(np.float64 if wide else np.float32)
    pattern = powers.view(np.int64 if wide else np.int32)
    np.bitwise_and(pattern, 0x7FF << 52 if wide else 0xFF << 23, out=pattern)
    powers = powers.astype(np.float32, copy=False)
    highest = 0
    if layout.is_float:
        limit = np.float32(2.0 ** (layout.mantissa + 1))
        far = np.flatnonzero(powers > limit)
        exponents = exponents.copy()
        exponents[far] = np.maximum(_exponents(after[far], layout), exponents[far])
        powers[far] = limit
        highest = int(exponents.max())
        factors = exponents.astype(np.int32)
        factors -= highest - 127
        np.maximum(factors, 1, out=factors)
        factors <<= 23
        np.multiply(powers, factors.view(np.float32), out=powers)
    peak = int(powers.max().view(np.int32)) >> 23
    shift = min(299 - peak, 254)  # brings the largest power to 2**45; smaller ones than 1 are then dropped
    runs = -(-len(powers) // _RUN)
    if len(powers) % _RUN:
        powers = np.concatenate([powers, np.zeros(runs * _RUN - len(powers), dtype=np.float32)])
    powers = powers.reshape(runs, _RUN)
    changed = powers.max(axis=1) > 0
    np.multiply(powers, np.int32(shift << 23).view(np.float32), out=powers)
    # Whole numbers below 2**53: the sums are exact, and the same in any order.
    sums = np.floor(powers, out=powers).sum(axis=1, dtype=np.float64)
    # In half octaves: twice the exponent and the first bit of the mantissa, less the elements of a run and the scale.
    halves = (sums.view(np.int64) >> 51) - 2 * (1023 + 7 + shift - 127)
    classes = np.clip(2 * (peak - 127) - halves, 0, 253) + 1
    return highest + peak - 126, np.where(changed, classes, 0).astype(np.uint8)


def _arrange(
    base: Array, exponents: Array, largest: int, classes: Array, layout: _Layout
) -> tuple[Array, list[tuple[int, int, int]]]:
    """The order in which elements are coded, and (predicted length, start, stop) of each group that occurs.

    Args:
        base, exponents: of the elements in runs whose class is not 0.
    """
    halves = (2 * largest + 1 - classes[classes != 0].astype(np.int32)).astype(np.int16)
    predicted = np.repeat(halves, _RUN)[: len(base)]
    predicted -= exponents
    predicted -= exponents
    np.clip(predicted, 0, 2 * layout.lengths - 1, out=predicted)
    # Key and place in one word: sorting words is faster than a stable sort of the keys, and comes to the same.
    keys = predicted.astype(np.uint32)
    keys <<= layout.context
    upper = (base >> (layout.mantissa - layout.context)).astype(np.uint32, copy=False)
    upper &= 2**layout.context - 1
    keys |= upper
    keys <<= _INDEX
    keys |= _PLACES[: len(keys)]
    keys.sort()
    limits = (np.arange(layout.lengths) << (layout.context + 1 + _INDEX)).astype(np.uint32)
    edges = [*np.searchsorted(keys, limits).tolist(), len(keys)]
    keys &= 2**_INDEX - 1
    groups = [(n, edges[n], edges[n + 1]) for n in range(layout.lengths) if edges[n] < edges[n + 1]]
    return keys.astype(np.int64), groups


def _centres(chosen: Array, largest: int, classes: Array, layout: _Layout) -> Array:
    """The exponent that the elements at these places are expected to have, shifted to where `_direct` has it."""
    halves = 2 * largest + 1 - classes[classes != 0].astype(np.int64)
    exponents = np.maximum((halves >> 1) - layout.mantissa - 1, 0).astype(layout.word)
    return np.take(exponents << (layout.mantissa + 1), chosen // _RUN)


def _direct(sides: Sequence[Array], noise: int, layout: _Layout) -> Array:
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


def _undirect(before: Array, values: Array, centres: Array, noise: int, layout: _Layout) -> Array:
    last = layout.bits - 1
    values = values + centres
    after: Array = (values >> (noise + 1)) << noise
    after |= values & layout.word.type(2**noise - 1)
    after |= ((values >> noise) << last) ^ (before & layout.word.type(2**last))
    return after


def _rule(values: Array) -> int:
    """Chooses from a sample how much of the values is noise, and whether a mask tells the unchanged."""
    sample = values[:: -(-len(values) // _SAMPLE)]
    changed = sample[sample != 0]
    zeros = len(sample) - len(changed)
    spread = (changed ^ (changed >> (values.itemsize * 8 - 1))) >> 7
    quarter = 0
    while 4 * quarter < values.itemsize * 8 - 8 and np.count_nonzero(spread) * 64 > len(changed):
        quarter += 1
        spread >>= 4
    # A mask is worth its bits where noise would be stored of unchanged elements, or where they are so many that the
    # Huffman coder, with one bit at least, takes too much.
    return quarter | (_MASKED if zeros * (32 if quarter else 3) > len(sample) else 0)
