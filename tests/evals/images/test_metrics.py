"""Accuracy, its interval, and the mean corruption error, by hand."""

from __future__ import annotations

import math

import pytest
from weightlab_evals.images.metrics import accuracy, corruption_error


def test_accuracy() -> None:
    found = accuracy(81, 263)  # the example of Newcombe 1998, table I: 0.2553 to 0.3662
    assert [found.low, found.high] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    none, all_ = accuracy(0, 20), accuracy(20, 20)
    assert (none.accuracy, none.low, all_.accuracy, all_.high) == (0.0, 0.0, 1.0, 1.0)
    assert none.high == pytest.approx(0.1611, abs=5e-5) and all_.low == pytest.approx(1 - 0.1611, abs=5e-5)
    for wrong in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError):
            accuracy(*wrong)


def test_mean_corruption_error() -> None:
    baseline = {"fog": {1: 0.2, 5: 0.6}, "snow": {1: 0.1, 5: 0.3}}
    assert corruption_error(baseline, baseline) == 1.0
    better = {"fog": {1: 0.1, 5: 0.3}, "snow": {1: 0.1, 5: 0.5}}
    assert corruption_error(better, baseline) == pytest.approx((0.5 + 1.5) / 2)
    perfect = {"fog": {5: 0.0}}
    assert corruption_error(perfect, perfect) == 1.0
    assert math.isinf(corruption_error({"fog": {5: 0.1}}, perfect))
    for other in ({}, {"fog": {1: 0.2}}, {"fog": {1: 0.2, 5: 0.6}}):
        with pytest.raises(ValueError):
            corruption_error(other, baseline)
