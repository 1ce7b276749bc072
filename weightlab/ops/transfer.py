"""Moving a fine-tune to another base: target + λ·(tuned − base), with the tune's tokens and chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from weightlab.adapters.reading import is_adapter
from weightlab.errors import MisfitError, NamesMismatchError, UsageError
from weightlab.networks.vocabulary import tokens_of, vocabulary_tensors
from weightlab.ops.carried import Carried, carried
from weightlab.ops.new_checkpoint import write_out
from weightlab.ops.operands import PathLike, base_of, model_path, open_patches, reading
from weightlab.ops.outcome import Outcome
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch
from weightlab.patches.ties import redundant_copy_of
from weightlab.patches.virtual import delta_patch
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.joined import JoinedSource
from weightlab.sources.virtual.named import NamedSource
from weightlab.sources.virtual.rows import RowsSource
from weightlab.stack.guards import clean_view
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Resources
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.vocabulary import RowPlan, rows_by_id, rows_by_token

Rows = Literal["by-token", "by-id"]


@dataclass(slots=True)
class RowCounts:
    """What became of the rows of embedding and head.

    Attributes:
        matched: rows with a difference.
        added: tokens that only the tune has, with their new ids.
        left: tokens of the target that stay as they are, as tune or source base lack them.
        dropped: tokens of tune and source base that the target lacks.
        padding: rows of no token, which stay as they are.
    """

    tensors: list[str]
    matched: int
    added: dict[str, int]
    left: int
    dropped: int
    padding: int


@dataclass(slots=True)
class Transfer(Outcome):
    """What was done.

    Attributes:
        rows: None where the three models number the same tokens in the same way.
        carried: fields and files that come from the tune, the others being the target's.
        kept: integer tensors that the tune changed; the target's stay.
    """

    rows: RowCounts | None = None
    carried: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def transfer(
    source_base: PathLike,
    source_tuned: PathLike,
    target_base: PathLike,
    out: PathLike,
    *,
    scale: float = 1.0,
    rows: Rows | None = None,
    allow_nonfinite: bool = False,
    wait: float = 0.0,
    dry_run: bool = False,
    resources: Resources | None = None,
) -> Transfer:
    """Writes target + λ·(tuned − base): a fine-tune, or chat vector, on another base (arXiv 2503.20110).

    Every tensor is round(target + λ·Δ), Δ in fp32, in the target's dtype. Configuration and generation settings are the
    target's; what the tune changed of chat template and special tokens is carried over, and told.

    Args:
        source_tuned: a checkpoint that was tuned from `source_base`, or a PEFT adapter for it.
        out: a new folder, or `NAME.safetensors` for a model of one file.
        scale: λ.
        rows: how rows of embeddings are matched; None: by token where there are tokenizers, otherwise by id, and only
            where the counts are the same.

    Raises:
        NamesMismatchError: lists every tensor that the three do not share.
        MisfitError: rows cannot be matched; weights are codes of a quantised checkpoint.
    """
    if rows not in (None, "by-token", "by-id"):
        raise UsageError(f"--rows {rows} is not understood", "choose by-token or by-id")
    options = ChangeOptions("refuse", allow_nonfinite, wait, dry_run, resources or Resources())
    round_scale(scale)
    paths = [model_path(source_base), Path(source_tuned), model_path(target_base)]
    if is_adapter(paths[1]):
        return _adapter(paths, Path(out), scale, options)
    model_path(source_tuned)
    with ExitStack() as stack:
        base, tuned, target = (_clean(stack, path, options) for path in paths)
        names = _names(base, tuned, target)
        folders = [path if path.is_dir() else None for path in paths]
        vocabulary = [n for n in vocabulary_tensors(folders[2], target.specs) if n in names]
        plan = _plan(folders, (base, tuned, target), {n: names[n] for n in vocabulary}, rows)
        moved = vocabulary if plan is not None and not plan.plain else []
        _require_shapes((base, tuned, target), {n: s for n, s in names.items() if n not in moved})
        patch = _patch((base, tuned, target), names, moved, plan, scale)
        beside = carried(paths[0], paths[1], paths[2], plan if moved else None) if folders[2] else Carried()
        done = _written(paths[2], Path(out), patch, 1.0, beside, options)
        if plan is not None and moved:
            tokens = plan.matched + plan.left + len(plan.new)
            done.rows = RowCounts(moved, plan.matched, plan.new, plan.left, plan.dropped, plan.rows - tokens)
        done.kept = _integers(base, tuned, target, options.resources)
        return done


def _adapter(paths: list[Path], out: Path, scale: float, options: ChangeOptions) -> Transfer:
    opening = base_of(paths[0], wait=options.wait, resources=options.resources)
    (patch,) = open_patches(paths[1], opening)
    beside = carried(paths[0], paths[1], paths[2], None) if paths[2].is_dir() else Carried()
    return _written(paths[2], out, patch, scale, beside, options)


def _written(target: Path, out: Path, patch: Patch, scale: float, beside: Carried, options: ChangeOptions) -> Transfer:
    entry = StackEntry(patch, round_scale(scale))
    done = write_out(target, out, lambda on: [*on, (patch.label, entry)], None, options, beside.files)
    return Transfer(**{name: getattr(done, name) for name in Outcome.__slots__}, carried=beside.fields)


def _clean(stack: ExitStack, path: Path, options: ChangeOptions) -> Source:
    source = stack.enter_context(reading(path, wait=options.wait))
    clean, _ = stack.enter_context(clean_view(source, options.resources))
    return clean


def _names(base: Source, tuned: Source, target: Source) -> dict[str, tuple[str, str, str]]:
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


def _plan(
    folders: list[Path | None],
    sources: tuple[Source, Source, Source],
    names: Mapping[str, tuple[str, str, str]],
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


def _require_shapes(sources: tuple[Source, Source, Source], names: Mapping[str, tuple[str, str, str]]) -> None:
    wrong = []
    for mine in names.values():
        shapes = [s.specs[n].shape for s, n in zip(sources, mine, strict=True)]
        if len(set(shapes)) > 1:
            wrong.append(f"{mine[2]}: {', '.join(str(list(shape)) for shape in shapes)}")
    if wrong:
        raise NamesMismatchError(
            f"{len(wrong)} tensors have other shapes in base, tune and target", "give three models of one size", wrong
        )


def _patch(
    sources: tuple[Source, Source, Source],
    names: Mapping[str, tuple[str, str, str]],
    moved: Collection[str],
    plan: RowPlan | None,
    scale: float,
) -> Patch:
    base, tuned, target = sources
    plain = [name for name in names if name not in moved]
    shown = []
    for index, source in enumerate((base, tuned)):
        mine = {name: three[index] for name, three in names.items()}
        shown.append(NamedSource(source, mine | {n: n for n in source.specs if n not in mine.values()}))
    parts: list[Source] = [DifferenceSource(shown[0], shown[1], plain, round_scale(scale))]
    if plan is not None and moved:
        parts.append(RowsSource(sources, {n: names[n] for n in moved}, plan, scale))
    delta = JoinedSource(parts, f"{tuned.label} - {base.label}")
    after = {
        n: TensorSpec(n, target.specs[n].dtype, (plan.rows, *target.specs[n].shape[1:]))
        if plan is not None and n in moved
        else target.specs[n]
        for n in names
    }
    return delta_patch(delta, {n: target.specs[n] for n in names}, after)


def _integers(base: Source, tuned: Source, target: Source, resources: Resources) -> list[str]:
    """Integer tensors that the tune changed."""
    names = [n for n, s in target.specs.items() if not s.is_float and n in base.specs and n in tuned.specs]
    before, after = (digest_tensors(source, names, resources) for source in (base, tuned))
    return [name for name in names if before[name] != after[name]]
