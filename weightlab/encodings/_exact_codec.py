"""The lossless codec of one block: the elements of a tuned tensor, given the same elements of the base.

Integers alone decide, so the bytes are the same on every processor:

1. The bit patterns of floats become integers in the order of the floats; what is stored is the difference of the two,
   modulo the word (FM-Delta, NeurIPS 2024). Its length in bits depends on how far the weights nearby moved and, floats
   being spaced by their exponent, on the base's exponent.
2. So the encoder notes for each run of `RUN` elements how far it moved (its class; runs that did not are left out).
   Class and base exponent predict the length of every difference, to both sides, and the elements are sorted by it.
3. The elements of one predicted length are a group. Its rule says how many low bits are noise and whether a mask tells
   the unchanged elements. Where the base is small beside the change, the tuned pattern itself is coded.
4. Noise is stored as it is (ZipNN, arXiv 2411.05239). The byte above it, the symbol, holds all structure and goes
   through the Huffman coder of zstd, with tables of its own for each group. What it cannot hold goes to `high`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weightlab.encodings._exact_groups import arrange, centres_of, classes_of, of_changed, put_changed, run_count
from weightlab.encodings._exact_words import Array, direct, exponents_of, layout_of, ordered, scratch, taken, undirect

PLANES = ("rules", "classes", "mask", "symbols", "low", "high")
_SAMPLE = 1024  # elements of a group that its rule is chosen from
_MASKED, _FAR = 16, 32  # flags of a rule; its lowest four bits are a quarter of the bits of noise


def split(base: Array, tuned: Array, dtype: str) -> list[list[Array]]:
    """Splits the change of a block of 1 to 2**19 elements, at least one of which changed, into `PLANES`.

    Args:
        base, tuned: the bytes of the same elements, uint8 and contiguous, little-endian.

    Returns:
        each plane as pieces (uint8) of unlike statistics, valid until the next call in this thread.
    """
    layout = layout_of(dtype)
    before, after = base.view(layout.word), tuned.view(layout.word)
    difference = ordered(after, layout, scratch("difference", len(before), layout.word))
    difference -= ordered(before, layout, scratch("ordered", len(before), layout.word))
    exponents = exponents_of(before, layout, scratch("exponents", len(before), np.int16))
    largest, classes = classes_of(exponents, after, difference.view(layout.signed), layout)
    if not classes.all():
        before, after = of_changed(before, classes, "before"), of_changed(after, classes, "after")
        difference = of_changed(difference, classes, "kept difference")
        exponents = of_changed(exponents, classes, "kept exponents")
    order, groups = arrange(before, exponents, largest, classes, layout)
    difference = taken(difference, order, scratch("sorted", len(order), layout.word)).view(layout.signed)
    every = scratch("symbols", len(order), np.int8)
    rules = bytearray(largest.to_bytes(2, "little"))
    mask, symbols, low, high = ([classes[:0]] for _ in range(4))
    for length, start, stop in groups:
        values = difference[start:stop]
        if length >= layout.direct:
            chosen = order[start:stop]
            sides = [taken(before, chosen), taken(after, chosen), centres_of(chosen, largest, classes, layout)]
            rule = _rule(direct([side[:: -(-len(chosen) // _SAMPLE)] for side in sides], 0, layout)) & 15
            values = direct(sides, 4 * rule, layout)
        else:
            rule = _rule(values)
        if rule & _MASKED:
            changed = values != 0
            mask.append(np.packbits(changed, bitorder="little"))
            values = taken(values, np.flatnonzero(changed))  # by places: by the mask itself is slower
        noise = 4 * (rule & 15)
        upper = np.right_shift(values, noise, out=scratch("above", len(values), layout.signed)) if noise else values
        symbol, every = every[: len(values)], every[len(values) :]
        np.copyto(symbol, upper, casting="unsafe")
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
    joined = [[_joined(name, pieces)] for name, pieces in (("mask", mask), ("low", low), ("high", high))]
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
    layout = layout_of(dtype)
    whole = base.view(layout.word)
    largest, rules = int.from_bytes(head[:2].tobytes(), "little"), head[2:].tolist()
    runs = run_count(len(whole))
    classes = read("classes", runs)(runs)
    before = whole if classes.all() else of_changed(whole, classes, "before")
    exponents = exponents_of(before, layout, scratch("exponents", len(before), np.int16))
    order, groups = arrange(before, exponents, largest, classes, layout)
    if len(rules) != len(groups) or any(4 * (rule & 15) > layout.bits - 8 or rule >= 2 * _FAR for rule in rules):
        raise ValueError("the rules do not fit the base")
    counts = [stop - start for _, start, stop in groups]
    masked = [index for index, rule in enumerate(rules) if rule & _MASKED]
    take_mask = read("mask", sum(-(-counts[index] // 8) for index in masked))
    places: dict[int, Array] = {}
    for index in masked:
        octets = take_mask(-(-counts[index] // 8))
        places[index] = np.flatnonzero(np.unpackbits(octets, count=counts[index], bitorder="little").view(np.bool_))
        counts[index] = len(places[index])
    spans = [(layout.bits - 4 * (rule & 15) - 1) // 8 if rule & _FAR else 0 for rule in rules]
    parts = [(count, 4 * (rule & 15), span) for count, rule, span in zip(counts, rules, spans, strict=True)]
    take_symbols = read("symbols", sum(counts))
    take_low = read("low", sum(count * (noise // 8) + noise % 8 // 4 * (-(-count // 2)) for count, noise, _ in parts))
    take_high = read("high", sum(count * span for count, _, span in parts))
    difference = scratch("difference", len(before), layout.word)
    for index, ((length, start, stop), (count, noise, span)) in enumerate(zip(groups, parts, strict=True)):
        found = difference[start:stop]
        values = scratch("values", count, layout.word) if index in places else found
        np.copyto(values.view(layout.signed), take_symbols(count).view(np.int8))
        for place in range(span):
            values += take_high(count).astype(layout.word) << (8 * place + 8)
        if noise:
            values <<= noise
        octets = values.view(np.uint8).reshape(-1, layout.size)
        for place in range(noise // 8):
            octets[:, place] = take_low(count)
        if noise % 8:
            nibbles = take_low(-(-count // 2))
            octets[::2, noise // 8] |= nibbles & 15
            octets[1::2, noise // 8] |= nibbles[: count // 2] >> 4
        if index in places:
            found.fill(0)
            found[places[index]] = values
        if length >= layout.direct:
            chosen = order[start:stop]
            old = taken(before, chosen)
            new = undirect(old, found, centres_of(chosen, largest, classes, layout), noise, layout)
            ordered(new, layout, found)
            found -= ordered(old, layout, new)
    moved = scratch("sorted", len(before), layout.word)
    moved[order] = difference
    moved += ordered(before, layout, scratch("ordered", len(before), layout.word))
    if before is whole:
        return ordered(moved, layout, np.empty_like(moved))
    result = whole.copy()
    put_changed(result, classes, ordered(moved, layout, scratch("ordered", len(before), layout.word)))
    return result


def _joined(plane: str, pieces: list[Array]) -> Array:
    return np.concatenate(pieces, out=scratch(plane, sum(map(len, pieces)), np.uint8))


def _rule(values: Array) -> int:
    """Chooses from a sample how much of the values is noise, and whether a mask tells the unchanged."""
    sample = values[:: -(-len(values) // _SAMPLE)]
    changed = sample[sample != 0]
    zeros, quarter = len(sample) - len(changed), 0
    if len(changed):
        # As much noise as leaves all but a 64th of the changed elements within a symbol.
        spread = (changed ^ (changed >> (values.itemsize * 8 - 1))) >> 7
        rank = len(changed) - len(changed) // 64 - 1
        quarter = -(-int(np.partition(spread, rank)[rank]).bit_length() // 4)
        quarter = min(quarter, values.itemsize * 2 - 2)
    # A mask is worth its bits where noise would be stored of unchanged elements, or where they are so many that the
    # Huffman coder, with one bit at least, takes too much.
    return quarter | (_MASKED if zeros * (32 if quarter else 3) > len(sample) else 0)
