"""Several operands under one set of names: filters and renamings as they are given to all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightlab.errors import UsageError
from weightlab.extract.match import renamed
from weightlab.patches.fit import StackEntry, names_of, patch_names
from weightlab.patches.patch import Patch
from weightlab.sources import Source
from weightlab.sources.virtual.named import NamedSource
from weightlab.tensors.naming import Renames, options, resolve, with_norms
from weightlab.tensors.select import matches, rename


def kept(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether filters leave a name in."""
    return (not include or matches(name, include)) and not matches(name, exclude)


def whole(
    patch: Patch, renames: Mapping[str, str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> StackEntry | None:
    """A patch at scale 1 with those filters that name something of it; None when they leave none of it.

    Of several patches each need not have what a filter names.
    """
    names = rename(patch.records, renames, idle=False).values()
    if not any(kept(name, include, exclude) for name in names):
        return None
    chosen, left = (tuple(p for p in given if any(matches(n, [p]) for n in names)) for given in (include, exclude))
    return StackEntry(patch, 1.0, chosen, left, renames)


def under_names_of(
    first: Source, others: Sequence[Source], renames: Renames | None
) -> tuple[list[Source], dict[str, str]]:
    """The others under the names of the first, and the renaming that was taken.

    Args:
        renames: {old: new} from the others' names, see `rename`; each OLD is to be found in one of them at least.
            "auto" infers it for each by itself.

    Raises:
        NamesMismatchError: see `resolve`.
        UsageError: an OLD that none of them has.
    """
    applicable = applying([[*other.specs, *other.aliases] for other in others], renames)
    found: list[Source] = []
    taken: dict[str, str] = {}
    for other, rules in zip(others, applicable, strict=True):
        source, used = renamed(first, other, rules)
        found.append(source)
        taken |= used
    return found, taken


def applying(names: Sequence[Iterable[str]], renames: Renames | None) -> list[Renames]:
    """Of the renames those that name something, for each of several sets of names.

    Raises:
        UsageError: an OLD that no name has.
    """
    if renames is None or renames == "auto":
        return [renames or {} for _ in names]
    each = [{old: new for old, new in renames.items() if applies(old, mine)} for mine in names]
    idle = sorted(renames.keys() - {old for mine in each for old in mine})
    if idle:
        raise UsageError("--map names that no tensor name has", "see the names with `weightlab inspect`", idle)
    return list(each)


def applies(old: str, names: Iterable[str]) -> bool:
    """Whether OLD of a renaming is in one of the names."""
    if old.startswith("."):
        return any(f"{old}." in f".{name}." for name in names)
    return any(name.startswith(old) for name in names)


def under_patch_names(
    base: Source, patch: Patch, renames: Renames | None, *, idle: bool = True
) -> tuple[Source, dict[str, str]]:
    """A patch's base under the names of the patch, and the renaming from the patch's names to the base's.

    Args:
        idle: whether an OLD that no name has is an error.

    Raises:
        NamesMismatchError, UsageError: see `resolve` and `rename`.
    """
    expected, there = patch_names(patch), names_of(base)
    if renames == "auto" and expected.keys() <= there.keys():
        return base, {}
    rules = resolve(expected, there, renames)
    rename(patch.records, rules, idle=idle)
    rules = with_norms(expected, there, rules)
    if not rules:
        return base, rules
    stored = {**{name: name for name in base.specs}, **base.aliases}
    shown = {name: stored[now] for name, now in rename(patch.records, rules, idle=False).items() if now in stored}
    rest = {name: name for name in base.specs if name not in {*shown.values(), *shown}}
    return NamedSource(base, {**rest, **shown}), rules


def told(rules: Mapping[str, str]) -> list[str]:
    """A note on a renaming that was inferred; none where none was."""
    return [f"names were mapped: {options(rules)}"] if rules else []
