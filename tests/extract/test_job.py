"""How far a decoded delta is from the true one, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from weightlab.extract.job import Distance, distance


def measured(delta: list[float], decoded: list[float], dtype: torch.dtype = torch.float32) -> Distance:
    true = torch.tensor(delta, dtype=dtype)
    return distance(true, torch.tensor(decoded, dtype=dtype), torch.empty_like(true))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(dtype: torch.dtype) -> None:
    assert measured([3.0, -4.0, 0.0], [3.0, -1.0, 4.0], dtype) == Distance(largest=4.0, error=5.0, norm=5.0)
    assert measured([1.0, 2.0], [1.0, 2.0], dtype) == Distance(0.0, 0.0, math.sqrt(5.0))
    assert measured([0.0], [-2.0], dtype) == Distance(2.0, 2.0, 0.0)


def test_what_is_not_finite_is_left_out() -> None:
    inf, nan = float("inf"), float("nan")
    assert measured([3.0, inf, nan, -inf], [0.0, inf, nan, -inf]) == Distance(3.0, 3.0, 3.0)
    assert measured([nan], [nan]) == Distance()


def test_tiles_add_up() -> None:
    joined = Distance(1.0, 3.0, 6.0).joined(Distance(2.0, 4.0, 8.0))
    assert joined == Distance(2.0, 5.0, 10.0)
    assert Distance().joined(joined) == joined


def test_the_largest_and_smallest_numbers() -> None:
    huge = measured([3e200, 4e200], [0.0, 0.0], torch.float64)
    assert huge.norm == huge.error == pytest.approx(5e200) and huge.largest == 4e200
    assert huge.joined(huge).norm == pytest.approx(5e200 * math.sqrt(2))
    tiny = measured([3e-40, 4e-40], [0.0, 0.0])
    assert tiny.norm == pytest.approx(5e-40, rel=1e-4)
    assert measured([3e-300, 4e-300], [0.0, 0.0], torch.float64).norm == pytest.approx(5e-300)


def test_nothing_may_share_memory_but_delta_and_decoded() -> None:
    delta = torch.tensor([1.0, 2.0])
    assert distance(delta, delta, torch.empty(2)) == Distance(0.0, 0.0, math.sqrt(5.0))
    assert delta.tolist() == [1.0, 2.0]
