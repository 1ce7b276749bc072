"""Choosing tensors by glob, and renaming prefixes."""

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
    """`OLD=NEW` prefix pairs as a mapping; either side may be empty, not both.

    Raises:
        UsageError: a pair without `=`, or the same OLD twice.
    """
    renames: dict[str, str] = {}
    for text in pairs:
        old, sign, new = text.partition("=")
        if not sign or (not old and not new) or old in renames:
            raise UsageError(f"--map takes OLD=NEW prefixes, each OLD once; got {text!r}", "for example --map bert.=")
        renames[old] = new
    return renames


def rename(names: Iterable[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Each name with its longest matching prefix replaced: {old name: new name}.

    Raises:
        NamesMismatchError: two names become one.
        UsageError: a prefix that no name has.
    """
    result: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        old = max((p for p in renames if name.startswith(p)), key=len, default=None)
        result[name] = name if old is None else renames[old] + name[len(old) :]
        used.update(() if old is None else (old,))
    idle = sorted(renames.keys() - used)
    if idle and result:
        raise UsageError("--map prefixes that no tensor name has", "see the names with `weightlab inspect`", idle)
    seen: dict[str, str] = {}
    clashes = [f"{n} and {seen[m]} both become {m}" for n, m in result.items() if seen.setdefault(m, n) != n]
    if clashes:
        raise NamesMismatchError("--map makes two tensors one", "give prefixes that keep names apart", clashes)
    return result
