"""How a tensor is cut into tiles: flat, row-major ranges of at most `TILE` elements.

Every encoding can decode any range that starts at a multiple of `TILE`, so one patched tensor is always
computed tile by tile, whatever mixture of encodings is on it.
"""

from __future__ import annotations

from collections.abc import Iterator

TILE = 2**19


def tiles(numel: int) -> Iterator[tuple[int, int]]:
    """All (start, stop) element ranges of a tensor of `numel` elements, in order; none for an empty one."""
    for start in range(0, numel, TILE):
        yield start, min(start + TILE, numel)


def tile_count(numel: int) -> int:
    return -(-numel // TILE)


def rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cuts the flat range [start, stop) of a matrix with `columns` columns into rectangles, in order.

    Yields:
        (first row, row after the last, first column, column after the last); at most three of them: the rest
        of a begun row, whole rows, the beginning of a row.
    """
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            end = min(stop, (row + 1) * columns)
            yield row, row + 1, column, column + end - start
        else:
            end = start + (stop - start) // columns * columns
            yield row, end // columns, 0, columns
        start = end
