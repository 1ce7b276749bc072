"""Sizes of every dtype, and tiles."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import save

from weightlab.tensors.spec import BY_TORCH, DTYPES, TensorSpec, compute_dtype
from weightlab.tensors.tiles import TILE, rectangles, tile_count, tiles


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.torch is not None], ids=lambda d: d.name)
def test_sizes_are_torchs(dtype: object) -> None:
    kind = DTYPES[dtype.name]  # type: ignore[attr-defined]
    assert kind.torch is not None and BY_TORCH[kind.torch] is kind
    for shape in ((3, 4), (0, 4), (2,)):
        tensor = TensorSpec("x", kind.name, shape).empty()
        assert tensor.dtype == kind.torch and tensor.nbytes == TensorSpec("x", kind.name, shape).nbytes
        assert f'"dtype":"{kind.name}"'.encode() in save({"x": tensor})  # the names are those of the format
    assert TensorSpec("x", kind.name, ()).numel == 1


def test_sub_byte_tensors_are_stored_as_bytes() -> None:
    spec = TensorSpec("x", "F4", (3, 4))
    assert (spec.nbytes, spec.stored) == (6, TensorSpec("x", "U8", (6,)))
    assert TensorSpec("x", "F6_E2M3", (4,)).nbytes == 3
    assert TensorSpec("x", "F32", (3,)).stored.dtype == "F32"


def test_the_matrix_that_a_tensor_is_seen_as() -> None:
    views = {(): (1, 1), (5,): (1, 5), (2, 3): (2, 3), (2, 3, 4): (2, 12), (0, 3): (0, 3)}
    assert {s: (TensorSpec("x", "F32", s).rows, TensorSpec("x", "F32", s).columns) for s in views} == views


def test_sums_are_in_fp64_when_any_input_is() -> None:
    narrow, wide = TensorSpec("x", "F16", ()), TensorSpec("x", "F64", ())
    assert compute_dtype(narrow, narrow) == torch.float32 and compute_dtype(narrow, wide) == torch.float64


@given(st.integers(0, 5 * TILE))
def test_tiles_cover_all_once(count: int) -> None:
    found = list(tiles(count))
    assert [n for pair in found for n in pair] == sorted(n for pair in found for n in pair)
    assert sum(stop - start for start, stop in found) == count and len(found) == tile_count(count)
    assert all(start % TILE == 0 and 0 < stop - start <= TILE for start, stop in found)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 30))
def test_rectangles_are_the_range(start: int, length: int, columns: int) -> None:
    cells = [
        row * columns + column
        for first, last, left, right in rectangles(start, start + length, columns)
        for row in range(first, last)
        for column in range(left, right)
    ]
    assert cells == list(range(start, start + length))
    assert len(list(rectangles(start, start + length, columns))) <= 3
