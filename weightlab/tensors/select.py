"""Choosing tensors by glob, and renaming prefixes and components."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from weightlab.errors import NamesMismatchError, UsageError


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any glob matches the whole name; `*` also matches dots."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def patterns(given: str | Collection[str]) -> tuple[str, ...]:
    """One glob or several as several: a string is one, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def select(names: Collection[str], include: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    """The names that some `include` matches (all, when there is none) and no `exclude` matches, order kept.

    Raises:
        UsageError: patterns that match nothing are listed; a misspelt pattern must not pass in silence.
    """
    include, exclude = patterns(include), patterns(exclude)
    idle = [p for p in (*include, *exclude) if not any(fnmatchcase(name, p) for name in names)]
    if idle:
        raise UsageError(
            "these patterns match no tensor", "see the names with `weightlab inspect`", [repr(p) for p in idle]
        )
    return [n for n in names if (not include or matches(n, include)) and not matches(n, exclude)]


def parse_renames(pairs: Iterable[str]) -> dict[str, str]:
    """`OLD=NEW` pairs as a mapping for `rename`; either side may be empty, not both.

    Raises:
        UsageError: a pair without `=`, the same OLD twice, or components (`.OLD`) that do not become such.
    """
    renames: dict[str, str] = {}
    for text in pairs:
        old, sign, new = text.partition("=")
        if not sign or (not old and not new) or old in renames:
            raise UsageError(f"--map takes OLD=NEW prefixes, each OLD once; got {text!r}", "for example --map bert.=")
        if old == "." or (old.startswith(".") and new and (not new.startswith(".") or new == ".")):
            raise UsageError(f"--map {text}: components become components", "for example --map .gamma=.weight")
        renames[old] = new
    return renames


def rename(names: Iterable[str], renames: Mapping[str, str], *, idle: bool = True) -> dict[str, str]:
    """Each name with whole components replaced, then its longest matching prefix: {old name: new name}.

    An OLD that starts with a dot is one or several whole components, wherever they are: `.gamma` to `.weight`, or
    `._checkpoint_wrapped_module` to nothing. Any other OLD is a prefix.

    Args:
        idle: whether an OLD that no name has is an error.

    Raises:
        NamesMismatchError: two names become one.
        UsageError: an OLD that no name has.
    """
    result: dict[str, str] = {}
    used: set[str] = set()
    inner = [old for old in renames if old.startswith(".")]
    outer = [old for old in renames if not old.startswith(".")]
    for name in names:
        shown = name
        for old in inner:
            dotted = f".{shown}."
            if f"{old}." in dotted:
                shown = dotted.replace(f"{old}.", f"{renames[old]}.").strip(".")
                used.add(old)
        prefix = max((p for p in outer if shown.startswith(p)), key=len, default=None)
        result[name] = shown if prefix is None else renames[prefix] + shown[len(prefix) :]
        used.update(() if prefix is None else (prefix,))
    unused = sorted(renames.keys() - used)
    if idle and unused and result:
        raise UsageError("--map names that no tensor name has", "see the names with `weightlab inspect`", unused)
    seen: dict[str, str] = {}
    clashes = [f"{n} and {seen[m]} both become {m}" for n, m in result.items() if seen.setdefault(m, n) != n]
    if clashes:
        raise NamesMismatchError("--map makes two tensors one", "give prefixes that keep names apart", clashes)
    return result
