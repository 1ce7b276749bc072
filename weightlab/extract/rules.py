"""Which encoding each tensor gets: one for all, or rules by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from weightlab.encodings import ENCODINGS, Encoding
from weightlab.errors import UsageError
from weightlab.tensors.spec import TensorSpec

EncodeRules = str | Mapping[str, str] | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Choice:
    """An encoding with its parameters. `fallback`: the rule's own encoding, where that does not suit the tensor."""

    name: str
    encoding: Encoding
    parameters: dict[str, Any]
    fallback: str = ""


def parse_choice(text: str) -> Choice:
    """An encoding as it is written: `low_rank:16`.

    Raises:
        UsageError: unknown name, or parameters that make no sense.
    """
    name, *arguments = text.split(":")
    encoding = ENCODINGS.get(name)
    return Choice(name, encoding, encoding.parse(arguments))


class Rules:
    """Encoding rules. The first pattern that matches a name wins; a rule without a pattern is for all that is left.

    Args:
        rules: `"exact"`; or a mapping {glob: encoding}; or a list of `ENCODING` and `GLOB=ENCODING`. None: exact.
    """

    def __init__(self, rules: EncodeRules) -> None:
        pairs: list[tuple[str, str]] = []
        if rules is None:
            pairs = [("*", "exact")]
        elif isinstance(rules, str):
            pairs = [_pair(rules)]
        elif isinstance(rules, Mapping):
            pairs = list(rules.items())
        else:
            pairs = [_pair(rule) for rule in rules] or [("*", "exact")]
        everywhere = [p for p in pairs if p[0] == "*"]
        if len(everywhere) > 1:
            raise UsageError(
                "more than one encoding is given for all tensors", "put a pattern before the others: GLOB=ENCODING"
            )
        pairs = [p for p in pairs if p[0] != "*"] + (everywhere or [("*", "exact")])
        self._rules = [(pattern, parse_choice(text)) for pattern, text in pairs]
        self._exact = parse_choice("exact")
        self._dense = parse_choice("dense")
        self.text = dict(pairs)

    @property
    def any_lossless(self) -> bool:
        """Whether any rule asks for a lossless encoding."""
        return any(choice.encoding.lossless for _, choice in self._rules)

    def check_used(self, names: Sequence[str]) -> None:
        """Raises:
        UsageError: lists the patterns that match no tensor.
        """
        idle = [p for p, _ in self._rules if p != "*" and not any(fnmatchcase(n, p) for n in names)]
        if idle:
            raise UsageError("these --encode patterns match no tensor", "see the names with `weightlab inspect`", idle)

    def choose(self, spec: TensorSpec, *, opaque: bool, values: bool) -> Choice:
        """The encoding of one tensor.

        Args:
            opaque: no sums are defined on it, so only exact will do.
            values: it holds values and not a difference (an added tensor), so only exact will do.
        """
        if opaque or values:
            return self._exact
        choice = next(c for pattern, c in self._rules if fnmatchcase(spec.name, pattern))
        if choice.encoding.accepts(spec, choice.parameters):
            return choice
        return Choice("dense", self._dense.encoding, {}, fallback=choice.name)


def _pair(text: str) -> tuple[str, str]:
    pattern, sign, encoding = text.rpartition("=")
    return (pattern, encoding) if sign else ("*", text)
