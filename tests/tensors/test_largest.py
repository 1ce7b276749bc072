"""The largest elements, found from histograms, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightlab.tensors.largest import largest


def chosen(values: Tensor, keep: int, size: int) -> list[int]:
    """The places of the largest elements, tile by tile."""
    tiles = torch.split(values, size)
    limit = largest(lambda: iter(tiles), keep, values.dtype)
    left, places = limit.equals, []
    for number, tile in enumerate(tiles):
        mask, left = limit.chosen(tile, left)
        places += [number * size + int(place) for place in np.flatnonzero(mask)]
    assert left == 0 or limit.every
    return places


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-30, -3e38, 2.0**-140, 7.0])
        | st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=40,
    ),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_first_of_the_largest(numbers: list[float], data: st.DataObject, dtype: torch.dtype) -> None:
    values = torch.tensor(numbers, dtype=dtype)
    keep = data.draw(st.integers(1, len(numbers)))
    by_sort = sorted(range(len(numbers)), key=lambda i: (-abs(float(values[i])), i))[:keep]
    assert chosen(values, keep, 7) == sorted(by_sort)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_sizes(dtype: torch.dtype) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for keep in (1, 777, 20_000, 199_999, 200_000):
        meant = torch.topk(values.abs(), keep).indices.sort().values.tolist()
        assert chosen(values, keep, 2**16) == meant
    coarse = (values * 4).round()  # many equals
    assert len(chosen(coarse, 20_000, 2**16)) == 20_000
