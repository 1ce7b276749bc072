"""Which row of an embedding goes to which, when models number their tokens differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightlab.errors import MisfitError

Vocabulary = Mapping[str, int]
"""{token: row}."""
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What each row of the target's embedding and head gets.

    Attributes:
        tuned, base: for each row of the result, the rows whose difference it gets; -1: none. A row with a tuned and no
            base row is one that only the tune has, and gets its values.
        new: tokens that only the tune has, with their rows.
        matched: rows that get a difference.
        left: tokens of the target that stay as they are, because the tune or its base lacks them.
        dropped: tokens of the tune and its base that the target lacks.
        target_rows: before.
    """

    tuned: Rows
    base: Rows
    new: dict[str, int]
    matched: int
    left: int
    dropped: int
    target_rows: int

    @property
    def rows(self) -> int:
        """Of the result."""
        return len(self.tuned)

    @property
    def plain(self) -> bool:
        """Whether every row goes to the same row."""
        same = np.arange(self.rows)
        return bool(np.array_equal(self.tuned, same) and np.array_equal(self.base, same))


def rows_by_id(base_rows: int, tuned_rows: int, target_rows: int, *, forced: bool) -> RowPlan:
    """Without tokenizers: the same ids.

    Raises:
        MisfitError: the counts differ, and `forced` is not set.
    """
    if not forced and not base_rows == tuned_rows == target_rows:
        raise MisfitError(
            f"embeddings of {base_rows:,}, {tuned_rows:,} and {target_rows:,} rows, and no tokenizers to match them by",
            "put the tokenizers' files beside the models, or pass --rows by-id if the same ids are the same tokens",
        )
    shared = min(base_rows, tuned_rows, target_rows)
    rows = np.full(target_rows, -1, dtype=np.int64)
    rows[:shared] = np.arange(shared)
    return RowPlan(rows, rows.copy(), {}, shared, target_rows - shared, 0, target_rows)


def rows_by_token(vocabularies: tuple[Vocabulary, Vocabulary, Vocabulary], counts: tuple[int, int, int]) -> RowPlan:
    """By token string. Rows that belong to no token (padding) stay as they are.

    A token that only the tune has keeps its id where the target numbers its tokens as the tune does; otherwise it gets
    the next one that is free.

    Args:
        vocabularies, counts: of the source base, the tune, the target: tokens, and rows of the embedding.

    Raises:
        MisfitError: a token of the tune has no row.
    """
    base, tuned, target = vocabularies
    base_rows, tuned_rows, target_rows = counts
    only = sorted((token for token in tuned if token not in base and token not in target), key=tuned.__getitem__)
    homeless = [f"{token!r}: {tuned[token]}" for token in only if tuned[token] >= tuned_rows]
    if homeless:
        raise MisfitError(
            f"the tune's tokenizer has tokens beyond its {tuned_rows:,} rows",
            "give the tokenizer of that model",
            homeless,
        )
    taken = set(target.values())
    as_tune = all(tuned.get(token) == row for token, row in target.items()) and not taken & {tuned[t] for t in only}
    first = max(taken, default=-1) + 1
    new = {token: tuned[token] if as_tune else first + place for place, token in enumerate(only)}
    rows = max([target_rows, *(row + 1 for row in new.values())])
    from_tuned, from_base = (np.full(rows, -1, dtype=np.int64) for _ in range(2))
    matched = left = 0
    for token, row in target.items():
        mine, before = tuned.get(token, tuned_rows), base.get(token, base_rows)
        if row < target_rows and mine < tuned_rows and before < base_rows:
            from_tuned[row], from_base[row] = mine, before
            matched += 1
        else:
            left += 1
    for token, row in new.items():
        from_tuned[row] = tuned[token]
    dropped = sum(token in base and token not in target for token in tuned)
    return RowPlan(from_tuned, from_base, new, matched, left, dropped, target_rows)
