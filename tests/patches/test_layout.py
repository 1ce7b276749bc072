"""Which tensors go into which file, and what parts are called."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from weightlab.patches import layout
from weightlab.patches.layout import StoredTensor, entry_name, shard_name, split
from weightlab.tensors.spec import TensorSpec


def stored(size: int, growing: int = 0) -> StoredTensor:
    fixed = {"delta": TensorSpec("delta", "U8", (size,))}
    return StoredTensor(fixed, ("data", growing) if growing else None)


def test_names() -> None:
    assert entry_name("a::b", "left") == "a::b::left"
    assert shard_name(0, 1) == "patch.safetensors"
    assert [shard_name(i, 3) for i in range(3)] == [f"patch-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_room() -> None:
    assert (stored(5, 7).least_bytes(), stored(5, 7).most_bytes()) == (5, 12)
    assert (stored(5).least_bytes(), stored(5).most_bytes()) == (5, 5)
    assert StoredTensor().most_bytes() == 0


def test_one_file_is_never_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)
    assert split({"a": stored(10), "b": stored(10)}, sharded=False) == [["a", "b"]]


def test_shards_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 10)
    tensors = {"a": stored(4), "b": stored(1, 5), "c": stored(1), "d": stored(30), "e": stored(0), "f": stored(10)}
    assert split(tensors, sharded=True) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert split({}, sharded=True) == [[]]


def test_a_header_that_would_be_too_long_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "HEADER_BYTES", 100_000)
    groups = split({"layer" * 20 + str(i): stored(1) for i in range(200)}, sharded=True)
    assert len(groups) > 1 and sum(map(len, groups)) == 200


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_order_is_kept_and_only_a_single_tensor_is_over_the_limit(sizes: list[int], limit: int) -> None:
    tensors = {f"t{i}": stored(size) for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "SHARD_BYTES", limit)
        groups = split(tensors, sharded=True)
    assert [name for group in groups for name in group] == list(tensors)
    for group in groups:
        assert len(group) <= 1 or sum(tensors[n].most_bytes() for n in group) <= limit
