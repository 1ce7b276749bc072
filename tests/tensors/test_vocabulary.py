"""Rows of embeddings by token and by id, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from weightlab.errors import MisfitError
from weightlab.tensors.vocabulary import RowPlan, rows_by_id, rows_by_token


def plan(found: RowPlan) -> tuple[list[int], list[int], dict[str, int], int, int, int, int]:
    counts = (found.matched, found.left, found.dropped, found.target_rows)
    return (found.tuned.tolist(), found.base.tolist(), found.new, *counts)


def test_by_id() -> None:
    same = rows_by_id(3, 3, 3, forced=False)
    assert plan(same) == ([0, 1, 2], [0, 1, 2], {}, 3, 0, 0, 3) and same.plain and same.rows == 3
    forced = rows_by_id(3, 2, 4, forced=True)
    assert plan(forced) == ([0, 1, -1, -1], [0, 1, -1, -1], {}, 2, 2, 0, 4) and not forced.plain
    for counts in ((2, 3, 3), (3, 2, 3), (3, 3, 2)):
        with pytest.raises(MisfitError, match="no tokenizers to match them by"):
            rows_by_id(*counts, forced=False)


BASE = {"a": 0, "b": 1, "c": 2}


def test_by_token_where_the_target_counts_otherwise() -> None:
    target = {"c": 0, "a": 1, "own": 2}
    found = rows_by_token((BASE, BASE, target), (3, 3, 4))  # the last row of the target is padding
    assert plan(found) == ([2, 0, -1, -1], [2, 0, -1, -1], {}, 2, 1, 1, 4) and not found.plain


def test_the_same_tokens_go_to_themselves() -> None:
    found = rows_by_token((BASE, BASE, BASE), (3, 3, 3))
    assert plan(found) == ([0, 1, 2], [0, 1, 2], {}, 3, 0, 0, 3) and found.plain
    assert not RowPlan(np.arange(2), np.array([1, 0]), {}, 2, 0, 0, 2).plain


def test_new_tokens_keep_their_ids_where_the_target_counts_as_the_tune() -> None:
    tuned = BASE | {"new": 4, "newer": 3}
    found = rows_by_token((BASE, tuned, BASE), (3, 5, 3))
    assert plan(found) == ([0, 1, 2, 3, 4], [0, 1, 2, -1, -1], {"newer": 3, "new": 4}, 3, 0, 0, 3)
    assert found.rows == 5


def test_new_tokens_get_the_next_free_ids_elsewhere() -> None:
    tuned = BASE | {"new": 3, "newer": 4}
    target = {"b": 0, "a": 1, "own": 5}
    found = rows_by_token((BASE, tuned, target), (3, 5, 7))
    tuned_rows = [1, 0, -1, -1, -1, -1, 3, 4]
    assert plan(found) == (tuned_rows, [1, 0, *[-1] * 6], {"new": 6, "newer": 7}, 2, 1, 1, 7)
    taken = rows_by_token((BASE, tuned, BASE | {"own": 3}), (3, 5, 4))  # the id of the tune's token is another's here
    assert taken.new == {"new": 4, "newer": 5}


def test_tokens_beyond_the_rows() -> None:
    assert plan(rows_by_token((BASE, BASE, BASE), (3, 3, 2))) == ([0, 1], [0, 1], {}, 2, 1, 0, 2)
    assert plan(rows_by_token((BASE, BASE, BASE), (2, 3, 3))) == ([0, 1, -1], [0, 1, -1], {}, 2, 1, 0, 3)
    assert plan(rows_by_token((BASE, BASE, BASE), (3, 2, 3))) == ([0, 1, -1], [0, 1, -1], {}, 2, 1, 0, 3)
    with pytest.raises(MisfitError, match="beyond its 3 rows") as failed:
        rows_by_token((BASE, BASE | {"far": 3, "farther": 9}, BASE), (3, 3, 3))
    assert failed.value.offenders == ("'far': 3", "'farther': 9")
    assert plan(rows_by_token(({}, {}, {}), (0, 0, 0))) == ([], [], {}, 0, 0, 0, 0)
    assert rows_by_token((BASE, BASE | {"new": 3}, {}), (3, 4, 0)).new == {"new": 3}
