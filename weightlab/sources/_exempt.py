"""Which modules a quantisation's configuration leaves as they are.

The lists have names, globs and regular expressions of people whom nobody knows. Nothing here backtracks: a pattern
becomes a row of characters, each once, any times or at most once, which are matched all at the same time. A pattern
that is more than that exempts nothing, so what it names stays opaque.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

LISTS = (
    "modules_to_not_convert",
    "llm_int8_skip_modules",
    "modules_to_not_quantize",
    "ignored_layers",
    "ignored_modules",
    "ignore",
    "exclude_modules",
    "exclude_layers",
    "exclude",
    "skip_modules",
)
"""Under these names the formats list what is not quantised."""
_LONGEST = 512
_DEEPEST = 64
_MOST_STEPS = 20_000_000
_SPECIAL = frozenset("*?+[](){}|^$\\")
Stop = Literal["any", "boundary", "end"]
"""Where in a name a match may end: anywhere, where a module's name ends, or where all of it does."""
_MOST_ALTERNATIVES = 64
_ESCAPES = {"d": "0123456789", "w": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"}


@dataclass(frozen=True, slots=True)
class _Item:
    """One character: which (None: any), whether it may be missing, whether it may come again."""

    characters: frozenset[str] | None
    optional: bool = False
    again: bool = False


def exempted(settings: Mapping[str, Any]) -> list[str]:
    """The patterns of a configuration, regular expressions marked with `re:`."""
    found: list[str] = []
    for key in LISTS:
        listed = settings.get(key)
        found += [p for p in listed if isinstance(p, str)] if isinstance(listed, list) else []
    dynamic = settings.get("dynamic")
    found += [f"re:{k[2:]}" for k in dynamic if k.startswith("-:")] if isinstance(dynamic, dict) else []
    by_module = settings.get("modules") or settings.get("module_fqn_to_config") or settings
    if isinstance(by_module, dict):  # torchao says None, MLX false, of a module that stays as it is
        found += [k for k, v in by_module.items() if (v is False or v is None) and "." in k]
    return found


def exempt_modules(modules: Collection[str], patterns: Sequence[str]) -> set[str]:
    """The modules that any pattern names, or that lie in one that it names.

    So many patterns that they would take minutes exempt nothing, apart from plain names.
    """
    plain = {p for p in patterns if not _SPECIAL & set(p) and not p.startswith("re:")}
    others = [p for p in dict.fromkeys(patterns) if p not in plain and p.removeprefix("re:") and len(p) <= _LONGEST]
    if len(others) * sum(map(len, modules)) > _MOST_STEPS:
        others = []
    return {m for m in modules if _is_named(m, plain) or any(_names(pattern, m) for pattern in others)}


def _is_named(module: str, names: Collection[str]) -> bool:
    """Whether any whole parts of it, one after the other, are one of these names."""
    parts = module.split(".")[:_DEEPEST]
    starts = range(len(parts) if names else 0)
    return any(".".join(parts[i:j]) in names for i in starts for j in range(i + 1, len(parts) + 1))


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):  # from the beginning, to wherever it ends
        return any(_matches(items, module, "end" if whole else "any") for items, whole in _expressions(pattern[3:]))
    every = [*_expressions(pattern), (_glob(pattern), True)]
    return any(_matches(items, module, "boundary") for items, _ in every)


@lru_cache(maxsize=4096)
def _glob(text: str) -> tuple[_Item, ...]:
    return tuple(_Item(None, True, True) if c == "*" else _Item(None if c == "?" else frozenset(c)) for c in text)


@lru_cache(maxsize=4096)
def _expressions(text: str) -> tuple[tuple[tuple[_Item, ...], bool], ...]:
    """(characters, whether it must end there) of each alternative; nothing where it is another kind of expression."""
    whole = text.endswith("$") and not text.endswith("\\$")
    text = text.removeprefix("^")[: -1 if whole else None]
    try:
        return tuple((tuple(_items(one)), whole) for one in _alternatives(text))
    except (ValueError, IndexError):
        return ()


def _alternatives(text: str) -> list[str]:
    """Texts without brackets for one with `(a|b)` in it."""
    found, depth, begin, choices = [""], 0, 0, list[str]()
    for place, character in enumerate(text):
        if character == "(":
            depth, begin, choices = depth + 1, place + 1, []
        elif character in "|)" and depth == 1:
            choices.append(text[begin:place].removeprefix("?:"))
            begin = place + 1
            if character == ")":
                depth, found = 0, [f + c for f in found for c in choices]
        elif depth == 0:
            found = [f + character for f in found]
        if depth > 1 or (character in "|)" and not choices) or len(found) > _MOST_ALTERNATIVES:
            raise ValueError
        if character == ")" and text[place + 1 : place + 2] in tuple("*+?{"):
            raise ValueError
    if depth:
        raise ValueError
    return found


def _items(text: str) -> Iterator[_Item]:
    place = 0
    while place < len(text):
        character, place = text[place], place + 1
        characters: frozenset[str] | None = frozenset(character)
        if character == "\\":
            escaped, place = text[place], place + 1
            if escaped.isalnum() and escaped not in _ESCAPES:
                raise ValueError
            characters = frozenset(_ESCAPES.get(escaped, escaped))
        elif character == "[":
            end = text.index("]", place)
            characters, place = _class(text[place:end]), end + 1
        elif character == ".":
            characters = None
        elif character in "*+?{}^$|()":
            raise ValueError
        count = text[place : place + 1]
        if count == "{":
            raise ValueError
        place += count in ("*", "+", "?") and count != ""
        if count == "+":
            yield _Item(characters)
        yield _Item(characters, count in ("*", "+", "?") and count != "", count in ("*", "+") and count != "")
        if count and text[place : place + 1] in ("?", "+") and count in ("*", "+", "?"):
            raise ValueError


def _class(text: str) -> frozenset[str]:
    if not text or text[0] == "^" or "\\" in text or "[" in text:
        raise ValueError
    found, place = set[str](), 0
    while place < len(text):
        if text[place + 1 : place + 2] == "-" and place + 2 < len(text):
            found |= {chr(c) for c in range(ord(text[place]), min(ord(text[place + 2]), 0x7F) + 1)}
            place += 3
        else:
            found.add(text[place])
            place += 1
    return frozenset(found)


def _matches(items: tuple[_Item, ...], text: str, stop: Stop) -> bool:
    """All positions that the pattern can be in are followed at the same time."""
    at = _with_skips({0}, items)
    for character in text:
        if len(items) in at and (stop == "any" or (stop == "boundary" and character == ".")):
            return True
        after: set[int] = set()
        for place in at:
            if place < len(items) and (items[place].characters is None or character in (items[place].characters or ())):
                after |= {place, place + 1} if items[place].again else {place + 1}
        at = _with_skips(after, items)
        if not at:
            return False
    return len(items) in at


def _with_skips(at: set[int], items: tuple[_Item, ...]) -> set[int]:
    found: set[int] = set()
    for begin in at:
        place = begin
        found.add(place)
        while place < len(items) and items[place].optional:
            place += 1
            found.add(place)
    return found
