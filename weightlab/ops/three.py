"""Three models of one architecture: a base, its tune, and another base; which rows belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from weightlab.errors import UsageError
from weightlab.networks.vocabulary import tokens_of
from weightlab.ops.alike import Names
from weightlab.ops.operands import ModelLike
from weightlab.sources import Source
from weightlab.tensors.vocabulary import RowPlan, rows_by_id, rows_by_token

Rows = Literal["by-token", "by-id"]
Three = tuple[Source, Source, Source]


def folder_of_model(model: ModelLike) -> Path | None:
    """The folder in which its configuration and tokenizer lie, if it is one."""
    return None if isinstance(model, Mapping) or not Path(model).is_dir() else Path(model)


def row_plan(
    folders: list[Path | None],
    sources: Three,
    names: Names,
    rows: Rows | None,
) -> RowPlan | None:
    """How rows are matched; None without embeddings."""
    if not names:
        return None
    first = next(iter(names.values()))
    base, tuned, target = (s.specs[n].shape[0] for s, n in zip(sources, first, strict=True))
    vocabularies = [None if f is None else tokens_of(f) for f in folders] if rows != "by-id" else [None] * 3
    one, other, third = vocabularies
    if one is None or other is None or third is None:
        if rows == "by-token":
            lacking = [str(s.label) for s, v in zip(sources, vocabularies, strict=True) if v is None]
            raise UsageError("rows cannot be matched by token without tokenizers", "put their files there", lacking)
        return rows_by_id(base, tuned, target, forced=rows == "by-id")
    return rows_by_token((one, other, third), (base, tuned, target))
