"""Patterns of module names in an adapter's configuration, matched as peft matches them, in bounded time.

They are regular expressions that a stranger wrote: Python's `re` can take for ever over one of thirty characters, and
cannot be stopped. `re` says whether a pattern is valid, as it does for peft; `regex`, which takes the same patterns and
a limit of time, matches it. Plain names are looked up.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from weightlab.errors import MalformedFileError

MAX_LENGTH, MAX_COUNT = 10_000, 256
"""Characters of a pattern, and patterns that are no plain names: trainers that list every module write long ones."""
SECONDS, USUAL = 2.0, 1e-5
"""Processor time that one set of patterns may take in all, beyond what a match of a sensible one takes."""

_PLAIN = re.compile(r"[\w.-]+")
_REMEDY = "mend the pattern in the adapter's configuration"
_Shape = tuple[int, tuple[int, ...]]
T = TypeVar("T")


class Patterns:
    """Regular expressions of names of modules, tried in their order.

    Args:
        patterns: as they stand in the configuration.
        where: the file and the key that they stand under, for messages.
        whole: whether a pattern must fit the whole name, as peft takes a text in `target_modules`; otherwise the name
            or its end after a dot, as it looks up `rank_pattern` and `alpha_pattern` (`get_pattern_key`).

    Raises:
        MalformedFileError: lists those that are no regular expressions, or are too long.
    """

    def __init__(self, patterns: Iterable[str], where: str, *, whole: bool = False) -> None:
        self._texts, self._where, self._whole, self._left = list(patterns), where, whole, SECONDS
        # A plain name is a pattern too, whose dots fit anything: looked up with its dots in the same places.
        self._plain: dict[_Shape, dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        wrong: list[str] = []
        for place, text in enumerate(self._texts):
            if isinstance(text, str) and _PLAIN.fullmatch(text):
                dots = tuple(at for at, letter in enumerate(text) if letter == ".")
                self._plain.setdefault((len(text), dots), {}).setdefault(text, place)
                continue
            with self._measured(str(text), ""):
                found = self._compiled(text)
            if isinstance(found, str):
                wrong.append(f"{str(text)[:80]!r}: {found}")
            else:
                self._expressions.append((place, found))
        if len(self._expressions) > MAX_COUNT:
            wrong.append(f"{len(self._expressions):,} patterns, where at most {MAX_COUNT} make sense")
        if wrong:
            raise MalformedFileError(f"{where}: no regular expressions", _REMEDY, wrong)
        self._by_length: dict[int, list[_Shape]] = {}
        for shape in self._plain:
            self._by_length.setdefault(shape[0], []).append(shape)

    def owner_of(self, module: str) -> str | None:
        """The first pattern that fits a module; None where none does.

        Raises:
            MalformedFileError: it takes too long.
        """
        with self._measured("plain names", module):
            first = min(self._named(module), default=len(self._texts))
        for place, expression in self._expressions:
            if place > first:
                break
            with self._measured(self._texts[place], module):
                match = expression.fullmatch if self._whole else expression.match
                if match(module, timeout=self._left):
                    return self._texts[place]
        return self._texts[first] if first < len(self._texts) else None

    def _named(self, module: str) -> Iterator[int]:
        """The places of plain names that fit."""
        starts = [0] if self._whole else [0, *(at + 1 for at, letter in enumerate(module) if letter == ".")]
        for end in (module[start:] for start in starts):
            for shape in self._by_length.get(len(end), ()):
                letters = list(end)
                for dot in shape[1]:
                    letters[dot] = "."
                place = self._plain[shape].get("".join(letters))
                if place is not None:
                    yield place

    def _compiled(self, text: object) -> Any:
        """The expression; a text that says why it is none."""
        if not isinstance(text, str):
            return "no text"
        if len(text) > MAX_LENGTH:
            return f"{len(text):,} characters, where at most {MAX_LENGTH:,} make sense"
        import regex

        expression = text if self._whole else rf"(.*\.)?({text})$"
        try:
            with warnings.catch_warnings():  # a pattern that will mean something else one day is still one
                warnings.simplefilter("ignore")
                re.compile(expression)
                return regex.compile(expression, regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            return str(error)

    @contextmanager
    def _measured(self, text: str, module: str) -> Iterator[None]:
        begun = time.thread_time()
        try:
            yield
        except (TimeoutError, MemoryError):
            self._left = 0
        else:
            self._left -= max(0.0, time.thread_time() - begun - USUAL)
        if self._left <= 0:
            what = f"{text[:80]!r}" + (f" with {module[:80]}" if module else "")
            raise MalformedFileError(f"{self._where}: matching takes more than {SECONDS:g} seconds", _REMEDY, [what])


def matched(values: Mapping[str, T], module: str, otherwise: T, where: str = "adapter_config.json") -> T:
    """The value of the first pattern that fits a module, as peft looks up `rank_pattern` and `alpha_pattern`.

    Args:
        values: {pattern: value}.
        where: what the patterns are of, for messages.

    Raises:
        MalformedFileError: see `Patterns`.
    """
    key = _patterns(tuple(values), where).owner_of(module)
    return otherwise if key is None else values[key]


@lru_cache(maxsize=16)
def _patterns(texts: tuple[str, ...], where: str) -> Patterns:
    return Patterns(texts, where)
