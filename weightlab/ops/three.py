"""Three models of one architecture: a base, its tune, and another base; which tensors and rows belong together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from weightlab.errors import MisfitError, NamesMismatchError, UsageError
from weightlab.networks.vocabulary import tokens_of
from weightlab.ops.operands import ModelLike, reading
from weightlab.patches.ties import redundant_copy_of
from weightlab.sources import Source
from weightlab.sources.virtual.named import NamedSource
from weightlab.stack.guards import clean_view
from weightlab.stream.executor import Resources
from weightlab.tensors.vocabulary import RowPlan, rows_by_id, rows_by_token

Rows = Literal["by-token", "by-id"]
Three = tuple[Source, Source, Source]
Names = Mapping[str, tuple[str, str, str]]
"""{name in the target: names in the three}."""


def folder_of_model(model: ModelLike) -> Path | None:
    """The folder in which its configuration and tokenizer lie, if it is one."""
    return None if isinstance(model, Mapping) or not Path(model).is_dir() else Path(model)


def under_target_names(source: Source, names: Names, index: int) -> Source:
    """One of the three, its tensors under the target's names."""
    mine = {name: three[index] for name, three in names.items()}
    return NamedSource(source, mine | {n: n for n in source.specs if n not in mine.values()})


def clean_source(stack: ExitStack, model: ModelLike, wait: float, resources: Resources) -> Source:
    source = stack.enter_context(reading(model, wait=wait))
    clean, _ = stack.enter_context(clean_view(source, resources))
    return clean


def shared_names(base: Source, tuned: Source, target: Source) -> dict[str, tuple[str, str, str]]:
    """{name in the target: its names in the three}, of all that can be summed.

    Raises:
        NamesMismatchError: lists what one of them lacks, or has beyond the target.
        MisfitError: lists weights that are codes.
    """
    found: dict[str, tuple[str, str, str]] = {}
    wrong: list[str] = []
    codes: list[str] = []
    used: tuple[set[str], set[str]] = (set(), set())
    for name, spec in target.specs.items():
        mine = [_stored(source, name, target) for source in (base, tuned)]
        lacking = [s.label for s, stored in zip((base, tuned), mine, strict=True) if stored is None]
        wrong += [f"{spec}: not in {label}" for label in lacking]
        if lacking:
            continue
        first, second = mine[0] or name, mine[1] or name
        used[0].add(first)
        used[1].add(second)
        opaque = name in target.opaque or first in base.opaque or second in tuned.opaque
        if spec.is_float and base.specs[first].is_float and tuned.specs[second].is_float and not opaque:
            found[name] = (first, second, name)
        elif spec.is_float or (opaque and len(spec.shape) > 1):
            codes.append(str(spec))
    for source, seen in zip((base, tuned), used, strict=True):
        extra = [n for n in source.specs if n not in seen and redundant_copy_of(source, n, seen) is None]
        wrong += [f"{source.specs[n]}: in {source.label}, not in {target.label}" for n in extra]
    if wrong:
        raise NamesMismatchError(
            f"{len(wrong)} tensors are not in all three models", "give three models of one architecture", wrong
        )
    if codes:
        raise MisfitError(
            "these weights are codes of a quantised checkpoint, on which no sums are defined",
            "transfer between the models before they were quantised",
            codes,
        )
    return found


def _stored(source: Source, name: str, target: Source) -> str | None:
    """Under which name a source has the target's tensor; a tied one may go by the other's."""
    if name in source.specs:
        return name
    if name in source.aliases:
        return source.aliases[name]
    return redundant_copy_of(target, name, [n for n in target.specs if n in source.specs])


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


def require_shapes(sources: Three, names: Names) -> None:
    wrong = []
    for mine in names.values():
        shapes = [s.specs[n].shape for s, n in zip(sources, mine, strict=True)]
        if len(set(shapes)) > 1:
            wrong.append(f"{mine[2]}: {', '.join(str(list(shape)) for shape in shapes)}")
    if wrong:
        raise NamesMismatchError(
            f"{len(wrong)} tensors have other shapes in base, tune and target", "give three models of one size", wrong
        )
