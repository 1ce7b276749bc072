"""The largest elements, found from histograms, against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightlab.tensors import largest as module
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
    assert limit.by_tile == [limit.count_equals(tile) for tile in tiles]
    assert dropped(values, keep, size) == places
    return places


def dropped(values: Tensor, keep: int, size: int) -> list[int]:
    """The same by what is left of the values when the others are made zero; those that were zero before count too."""
    limit = largest(lambda: iter(torch.split(values, size)), keep, values.dtype)
    left, places = limit.equals, []
    for number, tile in enumerate(torch.split(values, size)):
        mask, after = limit.chosen(tile, left)
        count, made = limit.count_equals(tile), tile.clone()
        limit.drop(made, None if limit.every or count <= left else left)
        assert torch.equal(made, tile * torch.from_numpy(mask))
        places += [number * size + place for place in np.flatnonzero(mask).tolist()]
        left = after
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_among_the_largest(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, float("nan"), -3.0, float("-inf"), 2.0, 0.5], dtype=dtype)
    limit = largest(lambda: iter([values]), 3, dtype)
    limit.drop(values, 1)
    assert not limit.finite and str(values.tolist()) == "[0.0, nan, -3.0, -inf, 0.0, 0.0]"


def test_where_too_many_patterns_would_be_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 1 + torch.rand(4000, generator=torch.Generator().manual_seed(0)) / 256  # whose upper 16 bits are alike
    found = largest(lambda: iter(torch.split(values, 1000)), 700, torch.float32)
    monkeypatch.setattr(module, "_REMEMBERED", 3500)
    again = largest(lambda: iter(torch.split(values, 1000)), 700, torch.float32)
    assert found.by_tile is not None and sum(found.by_tile) > 0 and again.by_tile is None
    assert (again.pattern, again.equals, again.every) == (found.pattern, found.equals, found.every)
