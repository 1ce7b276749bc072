"""Which elements of a block the lossless codec takes together: how far each run moved, and the order that follows."""

from __future__ import annotations

import numpy as np

from weightlab.encodings._exact_words import Array, Layout, exponents_of, scratch, taken

RUN = 128
_INDEX = 20  # bits of a place in a block: 2**19 complex numbers are 2**20 words
_PART = 2**15  # elements that are sorted at a time
_PLACES = np.arange(2**_INDEX, dtype=np.uint32)


def run_count(count: int) -> int:
    return -(-count // RUN)


def classes_of(exponents: Array, after: Array, difference: Array, layout: Layout) -> tuple[int, Array]:
    """How far each run moved: (the largest size, classes as uint8).

    The size of an element is the base's exponent plus the length of the difference in bits; where that is beyond an
    exponent's range, the larger of both exponents plus `mantissa` + 2. Class c > 0 stands for a size of
    `largest` - (c - 1) / 2, from the mean of the powers of two; class 0 for a run without any difference.
    """
    count, runs = len(difference), run_count(len(difference))
    padded = scratch("powers", runs * RUN, np.float32)
    padded[count:] = 0
    powers = padded[:count]
    if layout.bits == 64:
        wide = scratch("wide powers", count, np.float64)
        np.copyto(wide, difference)
        np.bitwise_and(wide.view(np.int64), 0x7FF << 52, out=wide.view(np.int64))
        np.copyto(powers, wide, casting="same_kind")
    else:
        np.copyto(powers, difference, casting="unsafe")
        np.bitwise_and(powers.view(np.int32), 0xFF << 23, out=powers.view(np.int32))
    highest = 0
    if layout.is_float:
        limit = np.float32(2.0 ** (layout.mantissa + 1))
        far = np.flatnonzero(np.greater(powers, limit, out=scratch("far", count, np.bool_)))
        sizes = scratch("sizes", count, np.int16)
        np.copyto(sizes, exponents)
        sizes[far] = np.maximum(exponents_of(after[far], layout, np.empty(len(far), np.int16)), exponents[far])
        powers[far] = limit
        highest = int(sizes.max())
        sizes -= np.int16(highest - 127)
        factors = scratch("factors", count, np.int32)
        np.copyto(factors, np.clip(sizes, 1, 127, out=sizes))
        factors <<= 23
        powers *= factors.view(np.float32)
    peak = int(powers.max().view(np.int32)) >> 23
    shift = min(299 - peak, 254)  # brings the largest power to 2**45; smaller ones than 1 are then dropped
    rows = padded.reshape(runs, RUN)
    changed = np.bitwise_or.reduce(rows.view(np.uint64), axis=1) != 0
    rows *= np.int32(shift << 23).view(np.float32)
    # Whole numbers below 2**53: the sums are exact, and the same in any order.
    sums = np.floor(rows, out=rows).sum(axis=1, dtype=np.float64)
    # In half octaves: twice the exponent and the first bit of the mantissa, less the elements of a run and the scale.
    halves = (sums.view(np.int64) >> 51) - 2 * (1023 + 7 + shift - 127)
    classes = np.clip(2 * (peak - 127) - halves, 0, 253) + 1
    return highest + peak - 126, np.where(changed, classes, 0).astype(np.uint8)


def of_changed(values: Array, classes: Array, name: str) -> Array:
    """The elements in runs whose class is not 0, in the scratch array of that name."""
    kept, whole = classes != 0, len(values) // RUN
    full = int(np.count_nonzero(kept[:whole])) * RUN
    rest = values[whole * RUN :] if kept[-1] else values[:0]
    out = scratch(name, full + len(rest), values.dtype)
    np.compress(kept[:whole], values[: whole * RUN].reshape(whole, RUN), axis=0, out=out[:full].reshape(-1, RUN))
    out[full:] = rest
    return out


def put_changed(out: Array, classes: Array, values: Array) -> None:
    """Puts what `of_changed` took back to its places."""
    kept, whole = classes != 0, len(out) // RUN
    full = int(np.count_nonzero(kept[:whole])) * RUN
    out[: whole * RUN].reshape(whole, RUN)[kept[:whole]] = values[:full].reshape(-1, RUN)
    if kept[-1]:
        out[whole * RUN :] = values[full:]


def arrange(
    base: Array, exponents: Array, largest: int, classes: Array, layout: Layout
) -> tuple[Array, list[tuple[int, int, int]]]:
    """The order in which elements are coded, and (predicted length, start, stop) of each group that occurs.

    Args:
        base, exponents: of the elements in runs whose class is not 0.
    """
    halves = (2 * largest + 1 - classes[classes != 0].astype(np.int32)).astype(np.int16)
    repeated = scratch("keys", len(halves) * RUN, np.int16)
    np.copyto(repeated.reshape(-1, RUN), halves[:, None])
    keys = repeated[: len(base)]
    keys -= exponents
    keys -= exponents
    np.clip(keys, 0, 2 * layout.lengths - 1, out=keys)
    if layout.context:
        keys <<= layout.context
        upper = scratch("upper", len(keys), np.int16)
        np.right_shift(base, layout.mantissa - layout.context, out=upper, casting="unsafe")
        upper &= 2**layout.context - 1
        keys |= upper
    order = scratch("order", len(keys), np.int64)
    limits = [length << (layout.context + 1) for length in range(layout.lengths + 1)]
    edges = _count(keys, limits, order) if limits[-1] <= 256 else _sort(keys, limits, order)
    return order, [(n, edges[n], edges[n + 1]) for n in range(layout.lengths) if edges[n] < edges[n + 1]]


def _sort(keys: Array, limits: list[int], order: Array) -> list[int]:
    """Fills `order` with the places of the keys in stable order; gives the place in it where each limit begins."""
    # Key and place in one word: sorting words is faster than a stable sort of the keys, and comes to the same.
    words = scratch("words", len(keys), np.uint32)
    np.copyto(words, keys, casting="unsafe")
    words <<= _INDEX
    words |= _PLACES[: len(keys)]
    words.sort()
    edges = np.searchsorted(words, np.asarray(limits[:-1], dtype=np.uint32) << _INDEX).tolist()
    words &= 2**_INDEX - 1
    np.copyto(order, words)
    return [*edges, len(keys)]


def _count(keys: Array, limits: list[int], order: Array) -> list[int]:
    """The same for keys of one byte, which numpy sorts by counting: part by part, so that it stays in the cache."""
    octets = scratch("octets", len(keys), np.uint8)
    np.copyto(octets, keys, casting="unsafe")
    if len(keys) <= _PART:
        np.copyto(order, octets.argsort(kind="stable"))
        return [*np.searchsorted(octets, np.asarray(limits[:-1], dtype=np.uint8), sorter=order).tolist(), len(keys)]
    present = np.arange(limits[-1], dtype=np.uint8)
    orders, edges = list[Array](), list[list[int]]()
    for start in range(0, len(keys), _PART):
        part = octets[start : start + _PART]
        orders.append(part.argsort(kind="stable"))
        edges.append([*np.searchsorted(part, present, sorter=orders[-1]).tolist(), len(part)])
        orders[-1] += start
    pairs = list(zip(orders, edges, strict=True))
    np.concatenate(
        [places[edge[key] : edge[key + 1]] for key in range(limits[-1]) for places, edge in pairs], out=order
    )
    return [sum(edge[limit] for edge in edges) for limit in limits]


def centres_of(chosen: Array, largest: int, classes: Array, layout: Layout) -> Array:
    """The exponent that the elements at these places are expected to have, shifted to where `direct` has it."""
    halves = 2 * largest + 1 - classes[classes != 0].astype(np.int64)
    exponents = np.maximum((halves >> 1) - layout.mantissa - 1, 0).astype(layout.word)
    return taken(exponents << (layout.mantissa + 1), chosen >> (RUN.bit_length() - 1))
