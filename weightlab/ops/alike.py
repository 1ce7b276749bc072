"""Models of one architecture, the last of which has the names: which tensors belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

from weightlab.errors import MisfitError, NamesMismatchError
from weightlab.ops.operands import ModelLike, reading
from weightlab.patches.compute import digest_tensors
from weightlab.patches.ties import redundant_copy_of
from weightlab.sources import Source
from weightlab.sources.virtual.named import NamedSource
from weightlab.sources.virtual.renamed import RenamedSource
from weightlab.stack.guards import clean_view
from weightlab.stream.executor import Resources
from weightlab.tensors.codes import refusal, require_same_form
from weightlab.tensors.naming import Renames, infer, remedy, resolve, with_norms
from weightlab.tensors.select import matches, rename, select

Names = Mapping[str, tuple[str, ...]]
"""{name in the target, which is the last model: names in each of them}."""


def clean_source(stack: ExitStack, model: ModelLike, wait: float, resources: Resources) -> Source:
    source = stack.enter_context(reading(model, wait=wait))
    clean, _ = stack.enter_context(clean_view(source, resources))
    return clean


def under_target_names(source: Source, names: Names, index: int) -> Source:
    """One of the models, its tensors under the target's names."""
    mine = {name: every[index] for name, every in names.items()}
    return NamedSource(source, mine | {n: n for n in source.specs if n not in mine.values()})


def shared_names(
    sources: Sequence[Source],
    resources: Resources,
    renames: Renames | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """{name in the target, the last one: its names in all of them}, of all that can be summed.

    What cannot be, codes and integers, is the same in all of them and stays; single numbers and vectors of integers
    (counters of batches) may differ, and stay as the target has them.

    Args:
        renames: {old: new} from the target's names to the others', or "auto"; what the target has beyond them is then
            left alone.
        include, exclude: globs over the target's names; what they leave out is not compared.

    Raises:
        NamesMismatchError: lists what one of them lacks, or has beyond the target.
        MisfitError: lists codes, and matrices of integers, that are not the same in all.
    """
    *others, real = sources
    for source in others:
        require_same_form(source, real)
    mapped = resolve(real.specs, others[0].specs, renames)
    rules = with_norms(real.specs, others[0].specs, mapped)
    target = RenamedSource(real, rules) if rules else real
    own = {shown: name for name, shown in rename(real.specs, rules).items()}
    chosen = set(select([*real.specs], include, exclude))
    found: dict[str, tuple[str, ...]] = {}
    wrong: list[str] = []
    fixed: dict[str, list[tuple[Source, str]]] = {}
    used: list[set[str]] = [set() for _ in others]
    for name, spec in target.specs.items():
        mine = [_stored(source, name, target) for source in others]
        if own[name] not in chosen:
            for seen, stored in zip(used, mine, strict=True):
                seen.add(stored or name)
            continue
        if mapped and not any(mine):
            continue
        lacking = [s.label for s, stored in zip(others, mine, strict=True) if stored is None]
        wrong += [f"{spec}: not in {label}" for label in lacking]
        if lacking:
            continue
        theirs = [stored or name for stored in mine]
        for seen, stored in zip(used, theirs, strict=True):
            seen.add(stored)
        each = [*zip(others, theirs, strict=True), (target, name)]
        if any(stored in source.opaque for source, stored in each):
            fixed[name] = each
        else:
            found[own[name]] = (*theirs, own[name])
    for source, seen in zip(others, used, strict=True):
        target_names = _as_target(source, rules)
        extra = [n for n in source.specs if _wanted({n, target_names.get(n, n)}, include, exclude)]
        extra = [n for n in extra if n not in seen and redundant_copy_of(source, n, seen) is None]
        wrong += [f"{source.specs[n]}: in {source.label}, not in {target.label}" for n in extra]
    if wrong:
        hidden = [] if mapped else infer(real.specs, others[0].specs)
        if hidden and hidden[0].paired == min(len(real.specs), len(others[0].specs)):
            raise NamesMismatchError(
                f"{real.label} has other names than {others[0].label}: {hidden[0].paired} tensors pair up by a "
                "renaming",
                remedy(hidden),
            )
        raise NamesMismatchError(
            f"{len(wrong)} tensors are not in all {_NUMBERS.get(len(sources), len(sources))} models",
            "give models of one architecture",
            wrong,
        )
    require_same(fixed, resources)
    return found


def _as_target(source: Source, rules: Mapping[str, str]) -> dict[str, str]:
    """{a source's name: what the target would call it}, as far as that can be told: filters are over those names."""
    back = {new: old for old, new in rules.items() if new or not old.startswith(".")}
    try:
        return rename(source.specs, back, idle=False)
    except NamesMismatchError:  # the way back is not one to one
        return {}


def _wanted(names: Collection[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or any(matches(n, include) for n in names)) and not any(matches(n, exclude) for n in names)


def require_same(fixed: Mapping[str, Sequence[tuple[Source, str]]], resources: Resources) -> None:
    """Checks that tensors without sums are the same bytes in several models.

    Args:
        fixed: {name: (model, its name there)}.

    Raises:
        MisfitError: lists codes that differ; or else integers of two dimensions or more.
    """
    sources = {id(source): source for each in fixed.values() for source, _ in each}
    wanted: dict[int, list[str]] = {}
    for each in fixed.values():
        for source, stored in each:
            wanted.setdefault(id(source), []).append(stored)
    digests = {
        key: digest_tensors(sources[key], list(dict.fromkeys(names)), resources) for key, names in wanted.items()
    }
    differing = [n for n, each in fixed.items() if len({digests[id(s)][stored] for s, stored in each}) > 1]
    coded = [n for n in differing if any(s.specs[stored].is_float or stored in s.codes for s, stored in fixed[n])]
    if coded:
        raise refusal(*(s for s, _ in fixed[coded[0]]), names=coded)
    buffers = [n for n in differing if any(len(s.specs[stored].shape) > 1 for s, stored in fixed[n])]
    if buffers:
        raise MisfitError(
            "these integer buffers are not the same in all models, and integers have no sum",
            "take them from one model: write it into the others first",
            [
                f"{name}: {', '.join(f'{s.specs[stored]} in {s.label}' for s, stored in fixed[name])}"
                for name in buffers
            ],
        )


_NUMBERS = {2: "two", 3: "three"}


def _stored(source: Source, name: str, target: Source) -> str | None:
    """Under which name a source has the target's tensor; a tied one may go by the other's."""
    if name in source.specs:
        return name
    if name in source.aliases:
        return source.aliases[name]
    return redundant_copy_of(target, name, [n for n in target.specs if n in source.specs])


def require_shapes(sources: Sequence[Source], names: Names) -> None:
    """Raises:
    NamesMismatchError: lists every tensor that has another shape in one of them.
    """
    wrong = []
    for mine in names.values():
        shapes = [s.specs[n].shape for s, n in zip(sources, mine, strict=True)]
        if len(set(shapes)) > 1:
            wrong.append(f"{mine[-1]}: {', '.join(str(list(shape)) for shape in shapes)}")
    if wrong:
        labels = ", ".join(source.label for source in sources)
        raise NamesMismatchError(
            f"{len(wrong)} tensors have other shapes in {labels}", "give models of one size", wrong
        )
