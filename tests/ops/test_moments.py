"""Norms, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from weightlab.ops.moments import Moments, moments
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources

STATE = {
    "a": torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0]),
    "bad": torch.tensor([1.0, float("nan"), float("-inf"), 2.0]).bfloat16(),
    "wide": torch.tensor([-3e200, 4e200, 0.0], dtype=torch.float64),
    "tiny": torch.tensor([3e-200, -4e-200], dtype=torch.float64),
    "none": torch.zeros(0),
    "zero": torch.zeros(3),
}


@pytest.mark.parametrize("threads", [1, 3])
def test_by_hand(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("weightlab.tensors.tiles.TILE", 2)
    done: list[int] = []
    resources = Resources(threads=threads, progress=lambda now, _: done.append(now))
    found = moments(MemorySource(STATE), list(STATE), resources)
    assert found["a"] == Moments(5, 5.0, 4.0, 2, 0)
    assert found["bad"] == Moments(4, math.sqrt(5.0), 2.0, 4, 2)
    for name, size in (("wide", 1e200), ("tiny", 1e-200)):  # whose squares are beyond fp64
        assert found[name].norm == pytest.approx(5 * size) and found[name].largest == 4 * size
    assert found["none"] == Moments() and found["zero"] == Moments(3)
    assert max(done) == 5 * 4 + 4 * 2 + 3 * 8 + 2 * 8 + 3 * 4


def test_norms_and_sums() -> None:
    both = Moments(4, 3.0, 3.0, 2, 1)
    both.add(Moments(21, 4.0, 2.0, 3, 4))
    assert both == Moments(25, 5.0, 3.0, 5, 5)
    assert both.rms == 1.0 and Moments().rms == 0.0
