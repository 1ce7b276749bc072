"""Inner products of sets of tensors, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightlab.errors import NonFiniteError
from weightlab.extract.gram import cosine, gram, joined
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources

SETS = [
    {"a": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "b": torch.tensor([[2.0]])},
    {"a": torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0]).bfloat16()},
    {"a": torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0], dtype=torch.float64), "b": torch.tensor([[-3.0]])},
]
A = [[55.0, 3.0, 12.0], [3.0, 3.0, 2.0], [12.0, 2.0, 5.0]]
B = [[4.0, 0.0, -6.0], [0.0, 0.0, 0.0], [-6.0, 0.0, 9.0]]


@pytest.mark.parametrize("threads", [1, 3])
def test_by_hand(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("weightlab.tensors.tiles.TILE", 2)
    done: list[int] = []
    resources = Resources(threads=threads, progress=lambda now, _: done.append(now))
    found = gram([MemorySource(state) for state in SETS], ["a", "b", "nowhere"], resources)
    assert found["a"].tolist() == A and found["b"].tolist() == B
    assert found["nowhere"].tolist() == np.zeros((3, 3)).tolist()
    assert max(done) == 5 * 4 + 5 * 2 + 5 * 8 + 4 + 4
    assert joined(found, ["a", "b"]).tolist() == (np.array(A) + np.array(B)).tolist()
    assert joined(found, []).tolist() == np.zeros((3, 3)).tolist()
    assert cosine(found["b"], 0, 2) == -1.0 and cosine(found["b"], 0, 1) == 0.0
    assert cosine(found["a"], 0, 2) == pytest.approx(12 / np.sqrt(55 * 5))


def test_what_is_not_finite_is_listed() -> None:
    bad = {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}
    bad["c"] = torch.full((2,), 1e200, dtype=torch.float64)
    with pytest.raises(NonFiniteError) as failed:
        gram([MemorySource(bad)], ["a", "b", "c"], Resources())
    assert failed.value.offenders == ("a", "c")
