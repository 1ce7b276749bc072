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
        rules: `"dense"`; or a mapping {glob: encoding}; or a list of `ENCODING` and `GLOB=ENCODING`. What no rule is
            for is stored exact.

    Raises:
        UsageError: an encoding that is not understood, or two for all tensors.
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

    @property
    def any_lossless(self) -> bool:
        """Whether any rule asks for a lossless encoding."""
        return any(choice.encoding.lossless for _, choice in self._rules)

    def check_used(self, names: Sequence[str]) -> None:
        """Raises:
        UsageError: lists the patterns that no tensor is stored by.
        """
        used = {self._first(name)[0] for name in names}
        idle = [pattern for pattern, _ in self._rules if pattern != "*" and pattern not in used]
        if idle:
            raise UsageError(
                "these --encode patterns match no tensor, or none that an earlier one does not take",
                "see the names with `weightlab inspect`",
                idle,
            )

    def choose(self, before: TensorSpec | None, after: TensorSpec, *, opaque: bool) -> Choice:
        """The encoding of one tensor.

        A tensor that is added holds values and not a difference, so only exact will do. One that grows has values in
        its new rows, which an approximation made for differences would spoil: dense instead.

        Args:
            before, after: in the base (None for an added tensor) and in the tuned checkpoint.
            opaque: no sums are defined on it, so only exact will do.
        """
        if opaque or before is None:
            return self._exact
        choice = self._first(after.name)[1]
        if choice.encoding.lossless or choice.name == self._dense.name:
            return choice
        spec = TensorSpec(after.name, before.dtype, after.shape)
        if before.shape == after.shape and choice.encoding.accepts(spec, choice.parameters):
            return choice
        return self.dense_instead_of(choice)

    def dense_instead_of(self, choice: Choice) -> Choice:
        """Dense, for a tensor that another encoding does not suit."""
        return Choice(self._dense.name, self._dense.encoding, {}, fallback=choice.name)

    def _first(self, name: str) -> tuple[str, Choice]:
        return next(rule for rule in self._rules if fnmatchcase(name, rule[0]))


def _pair(text: str) -> tuple[str, str]:
    pattern, sign, encoding = text.rpartition("=")
    return (pattern, encoding) if sign else ("*", text)
