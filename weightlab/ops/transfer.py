"""Moving a fine-tune to another base: target + λ·(tuned − base), with the tune's tokens and chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from weightlab.errors import UsageError
from weightlab.networks.vocabulary import vocabulary_tensors
from weightlab.ops.alike import Names, clean_source, require_shapes, shared_names, under_target_names
from weightlab.ops.carried import Carried, carried
from weightlab.ops.connectivity import Connectivity, connectivity
from weightlab.ops.grown import carry_vocabulary
from weightlab.ops.new_checkpoint import write_out
from weightlab.ops.operands import PathLike, adapters_beside, base_of, is_only_adapter, model_path, open_patches
from weightlab.ops.outcome import Outcome
from weightlab.ops.three import Rows, Three, row_plan
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch
from weightlab.patches.virtual import delta_patch
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.joined import JoinedSource
from weightlab.sources.virtual.rows import RowsSource
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Resources
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.naming import Renames, resolve, with_norms
from weightlab.tensors.naming import options as typed
from weightlab.tensors.select import patterns, rename, select
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.vocabulary import RowPlan


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
        forecast: whether it is expected to work; None for adapters, and where none was asked for.
        rows: None where the three models number the same tokens in the same way.
        carried: fields and files that come from the tune, the others being the target's.
        kept: integer tensors that the tune changed; the target's stay.
    """

    forecast: Connectivity | None = None
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
    renames: Renames | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    forecast: bool = True,
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
        renames: {old: new} from the target's tensor names to those of base and tune, see `rename`; "auto" infers it.
            What the target has beyond the other two then stays as it is.
        include, exclude: globs over the target's tensor names; the others stay as they are.
        forecast: whether to say what is expected of it, for which the three models are read once more.

    Raises:
        NamesMismatchError: lists every tensor that the three do not share.
        MisfitError: rows cannot be matched; weights are codes of a quantised checkpoint.
    """
    if rows not in (None, "by-token", "by-id"):
        raise UsageError(f"--rows {rows} is not understood", "choose by-token or by-id")
    options = ChangeOptions("refuse", allow_nonfinite, wait, dry_run, resources or Resources())
    round_scale(scale)
    paths = [model_path(source_base), Path(source_tuned), model_path(target_base)]
    if is_only_adapter(paths[1]):
        if renames or include or exclude:
            raise UsageError(
                "--map, --include and --exclude are not for adapters here", "put it on with `weightlab apply`"
            )
        return _adapter(paths, Path(out), scale, options)
    model_path(source_tuned)
    with ExitStack() as stack:
        base, tuned, target = (clean_source(stack, path, wait, options.resources) for path in paths)
        inferred = renames == "auto"
        renames = resolve(target.specs, base.specs, renames)
        names = shared_names((base, tuned, target), options.resources, renames, patterns(include), patterns(exclude))
        folders = [path if path.is_dir() else None for path in paths]
        vocabulary = [n for n in vocabulary_tensors(folders[2], target.specs) if n in names]
        plan = row_plan(folders, (base, tuned, target), {n: names[n] for n in vocabulary}, rows)
        moved = vocabulary if plan is not None and not plan.plain else []
        require_shapes((base, tuned, target), {n: s for n, s in names.items() if n not in moved})
        patch = _patch((base, tuned, target), names, moved, plan, scale)
        beside = _beside(paths, Path(out), plan if moved else None)
        done = _written(paths[2], Path(out), patch, 1.0, beside, options)
        if plan is not None and moved:
            tokens = plan.matched + plan.left + len(plan.new)
            done.rows = RowCounts(moved, plan.matched, plan.new, plan.left, plan.dropped, plan.rows - tokens)
        if inferred and renames:
            done.notes.append(f"names of {target.label} were mapped: {typed(renames)}")
        if renames:
            done.notes += _alone(base, target, renames, select([*target.specs], include, exclude))
        done.notes += adapters_beside(source_base, source_tuned)
        done.kept = _integers(base, tuned, target, options.resources)
    if forecast and rows != "by-id" and any(name not in moved for name in names):
        done.forecast = connectivity(
            source_base,
            source_tuned,
            target_base,
            renames=renames,
            include=include,
            exclude=exclude,
            wait=wait,
            resources=options.resources,
        )
    return done


def _adapter(paths: list[Path], out: Path, scale: float, options: ChangeOptions) -> Transfer:
    opening = base_of(paths[0], wait=options.wait, resources=options.resources)
    (patch,) = open_patches(paths[1], opening)
    beside = _beside(paths, out, None)
    grown = carry_vocabulary(paths[2], out, [(patch.label, StackEntry(patch, round_scale(scale)))], [paths[1]])
    beside.files |= grown.files
    beside.fields += grown.notes
    return _written(paths[2], out, patch, scale, beside, options)


def _beside(paths: list[Path], out: Path, plan: RowPlan | None) -> Carried:
    """What comes along from the tune; nothing to a single file, which has nothing beside it."""
    if not paths[2].is_dir() or out.name.endswith(".safetensors"):
        return Carried()
    return carried(paths[0], paths[1], paths[2], plan)


def _written(target: Path, out: Path, patch: Patch, scale: float, beside: Carried, options: ChangeOptions) -> Transfer:
    entry = StackEntry(patch, round_scale(scale))
    done = write_out(target, out, lambda on: [*on, (patch.label, entry)], None, options, beside.files)
    return Transfer(**{name: getattr(done, name) for name in Outcome.__slots__}, carried=beside.fields)


def _patch(
    sources: Three,
    names: Names,
    moved: Collection[str],
    plan: RowPlan | None,
    scale: float,
) -> Patch:
    base, tuned, target = sources
    plain = [name for name in names if name not in moved]
    shown = [under_target_names(source, names, index) for index, source in enumerate((base, tuned))]
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


def _alone(base: Source, target: Source, renames: Mapping[str, str], chosen: Sequence[str]) -> list[str]:
    """A note on the chosen tensors of the target that the others have under no name."""
    shown = rename(target.specs, with_norms(target.specs, base.specs, renames))
    there = {*base.specs, *base.aliases, *target.aliases}
    alone = [name for name in chosen if shown[name] not in there]
    if not alone:
        return []
    few = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
    return [f"{len(alone)} tensors of {target.label} stay as they are, as {base.label} has none such: {few}"]


def _integers(base: Source, tuned: Source, target: Source, resources: Resources) -> list[str]:
    """Integer tensors that the tune changed."""
    names = [n for n, s in target.specs.items() if not s.is_float and n in base.specs and n in tuned.specs]
    before, after = (digest_tensors(source, names, resources) for source in (base, tuned))
    return [name for name in names if before[name] != after[name]]
