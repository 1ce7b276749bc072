"""Redundant copies are told by their bytes, and constant tensors are never taken for one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weightlab.patches.ties import Copies, redundant_copy_of, same_bytes
from weightlab.sources.virtual.memory import MemorySource
from weightlab.tensors.tiles import TILE


def source(**tensors: Tensor) -> MemorySource:
    return MemorySource(tensors)


def embedding(rows: int = 40, columns: int = 30) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_a_copy_is_found() -> None:
    held = source(head=embedding(), embed=embedding(), other=embedding() + 1)
    assert redundant_copy_of(held, "head", ["other", "embed"]) == "embed"
    assert redundant_copy_of(held, "head", ["other"]) is None
    assert redundant_copy_of(held, "head", ["head", "missing"]) is None
    assert redundant_copy_of(held, "missing", ["embed"]) is None


@pytest.mark.parametrize("place", [0, 1023, 1024, 1025, TILE - 1, TILE, 2 * TILE - 1])
def test_one_bit_anywhere_makes_it_another_tensor(place: int) -> None:
    one = embedding(2, TILE)
    other = one.clone()
    other.view(-1).view(torch.int32)[place] ^= 1
    held = source(one=one, other=other, same=one.clone())
    assert not same_bytes(held, "one", "other") and same_bytes(held, "one", "same")
    assert redundant_copy_of(held, "one", ["other"]) is None
    assert redundant_copy_of(held, "one", ["other", "same"]) == "same"


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_constant_tensors_are_equal_by_chance(fill: object) -> None:
    assert callable(fill)
    held = source(a=fill(50, 50), b=fill(50, 50))
    assert redundant_copy_of(held, "a", ["b"]) is None


def test_a_padding_row_of_zeros_does_not_make_a_tensor_constant() -> None:
    padded = torch.cat([torch.zeros(1, 5000), embedding(3, 5000)])
    assert redundant_copy_of(source(head=padded, embed=padded.clone()), "head", ["embed"]) == "embed"


def test_only_matrices_of_the_same_kind() -> None:
    vector, empty = embedding().reshape(-1), torch.empty(0, 4)
    held = source(a=vector, b=vector.clone(), e=empty, f=empty.clone(), m=embedding(), n=embedding().double())
    for name, other in (("a", "b"), ("e", "f"), ("m", "n")):
        assert redundant_copy_of(held, name, [other]) is None


class Counting(MemorySource):
    """Counts the bytes that are read."""

    count = 0

    def read(self, name: str, start: int, out: Tensor) -> None:
        self.count += out.numel()
        super().read(name, start, out)


def test_what_is_read_grows_with_the_tensors_and_not_with_their_pairs() -> None:
    """Equal ones, and such as are alike at a glance, are the most that can be asked."""
    begin = embedding(64, 32)
    tensors = {f"equal_{i}": torch.cat([begin, torch.ones(1, 32)]) for i in range(60)}
    tensors |= {f"alike_{i}": torch.cat([begin, torch.full((1, 32), 2.0 + i)]) for i in range(60)}
    held = Counting(tensors)
    copies = Copies(held, [f"{kind}_{i}" for kind in ("equal", "alike") for i in range(30)])
    found = [copies.of(f"equal_{i}") for i in range(30, 60)]
    lost = [copies.of(f"alike_{i}") for i in range(30, 60)]
    assert found == ["equal_0"] * 30 and lost == [None] * 30
    assert held.count < 5 * sum(spec.nbytes for spec in held.specs.values())
