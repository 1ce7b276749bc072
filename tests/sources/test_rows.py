"""Differences of embeddings row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightlab.errors import MisfitError
from weightlab.sources.virtual.memory import MemorySource
from weightlab.sources.virtual.rows import RowsSource
from weightlab.tensors.vocabulary import RowPlan, rows_by_id, rows_by_token

WORDS = list("abcdefgh")


def vocabulary(draw: st.DrawFn, words: list[str]) -> dict[str, int]:
    chosen = draw(st.lists(st.sampled_from(words), unique=True, min_size=1))
    return {word: place for place, word in enumerate(draw(st.permutations(chosen)))}


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3), st.sampled_from([1.0, 0.5]))
def test_every_row_gets_its_own_difference(
    data: st.DataObject, dtype: torch.dtype, columns: int, factor: float
) -> None:
    base, target = (data.draw(st.composite(vocabulary)(WORDS[:6])) for _ in range(2))
    tuned = data.draw(st.composite(vocabulary)(WORDS))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 3))
    counts = tuple(len(v) + more for v, more in zip((base, tuned, target), padding, strict=True))
    weights = [torch.randn(count, columns).to(dtype) for count in counts]
    plan = rows_by_token((base, tuned, target), counts)
    sources = tuple(MemorySource({"e": weight}) for weight in weights)
    made = RowsSource(sources, {"e": ("e", "e", "e")}, plan, factor)
    whole = torch.empty(plan.rows, columns)
    size = data.draw(st.integers(1, whole.numel()))
    for start in range(0, whole.numel(), size):  # in pieces that end anywhere
        piece = whole.view(-1)[start : start + size]
        made.read("e", start * 4, piece.view(torch.uint8))
    b, t, target_weight = (weight.float() for weight in weights)
    for token, row in target.items():
        expected = (
            factor * (t[tuned[token]] - b[base[token]]) if token in base and token in tuned else torch.zeros(columns)
        )
        assert torch.equal(whole[row], expected), token
    result = torch.cat([target_weight, torch.zeros(plan.rows - len(target_weight), columns)]) + whole
    assert plan.new.keys() == tuned.keys() - base.keys() - target.keys()
    for token, row in plan.new.items():
        assert torch.allclose(result[row], t[tuned[token]], atol=1e-5) and row not in target.values()
    assert len(set(plan.new.values())) == len(plan.new)
    assert plan.matched + plan.left == len(target)


def test_new_tokens_keep_the_tunes_ids_where_the_target_counts_as_it_does() -> None:
    base = {"a": 0, "b": 1}
    plan = rows_by_token((base, {**base, "<chat>": 2}, base), (4, 3, 4))
    assert plan.new == {"<chat>": 2} and plan.rows == 4 and plan.tuned.tolist() == [0, 1, 2, -1]  # a row of padding
    plan = rows_by_token((base, {**base, "<chat>": 2}, {"b": 0, "a": 1}), (2, 3, 2))
    assert plan.new == {"<chat>": 2} and plan.rows == 3 and plan.tuned.tolist() == [1, 0, 2]
    plan = rows_by_token((base, {**base, "<chat>": 2}, {**base, "c": 2}), (2, 3, 3))
    assert plan.new == {"<chat>": 3} and plan.rows == 4 and plan.left == 1
    assert plan.base.tolist() == [0, 1, -1, -1]


def test_without_tokenizers_ids_are_compared_and_counts_must_agree() -> None:
    assert rows_by_id(5, 5, 5, forced=False).plain
    with pytest.raises(MisfitError, match="no tokenizers"):
        rows_by_id(5, 6, 5, forced=False)
    plan: RowPlan = rows_by_id(4, 6, 5, forced=True)
    assert plan.tuned.tolist() == [0, 1, 2, 3, -1] and plan.matched == 4 and plan.left == 1


def test_a_token_without_a_row_is_an_error() -> None:
    with pytest.raises(MisfitError, match="beyond its 1 rows"):
        rows_by_token(({"a": 0}, {"a": 0, "b": 5}, {"a": 0}), (1, 1, 1))
