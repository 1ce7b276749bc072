"""What a merge method is given: the differences, and its parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlab.errors import UsageError
from weightlab.sources import Source
from weightlab.sources.virtual.computed import read_values
from weightlab.stream.executor import Resources
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.workspace import Workspace

Value = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Parameter:
    """One that a method has.

    Attributes:
        default: what it is if nobody says; its type is the parameter's.
        each: every difference may have its own.
        least, most: of a number.
        choices: of a word.
    """

    default: Value
    each: bool = False
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Value:
        """A value, or text from a command line, as this parameter's type.

        Raises:
            UsageError: it is none.
        """
        kind = type(self.default)
        try:
            if kind is bool:
                words = {"true": True, "false": False, True: True, False: False}
                return words[value.lower() if isinstance(value, str) else value]
            if isinstance(value, bool):
                raise ValueError
            if kind is int and not isinstance(value, str) and value != int(value):
                raise ValueError
            read = kind(value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise UsageError(f"{name}={value} makes no sense", f"give {self.words()}") from None
        if self.choices and read not in self.choices:
            raise UsageError(f"{name}={value} makes no sense", f"give {self.words()}")
        if not isinstance(read, str) and not (self.least <= read <= self.most and math.isfinite(read)):
            raise UsageError(f"{name}={value} makes no sense", f"give {self.words()}")
        return read

    def words(self) -> str:
        """What is taken, for a message."""
        if self.choices:
            return " or ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        words = "a whole number" if isinstance(self.default, int) else "a number"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{words} from {self.least:g} to {self.most:g}"
        return f"{words} not below {self.least:g}" if math.isfinite(self.least) else words


class Settings:
    """The parameters of one merge, complete.

    Args:
        given: {name: a value, or a list with one for each difference}.
        count: how many differences there are.

    Attributes:
        plain: all are the defaults.

    Raises:
        UsageError: lists all that the method does not have; or a value makes no sense.
    """

    def __init__(
        self, method: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any] | None, count: int
    ) -> None:
        unknown = [name for name in given or {} if name not in parameters]
        if unknown:
            raise UsageError(
                f"{method} has no such parameter", f"it has {', '.join(parameters) or 'none'}", sorted(unknown)
            )
        self.plain = all((given or {}).get(name, p.default) == p.default for name, p in parameters.items())
        self._shared: dict[str, Value] = {}
        self._each: dict[str, list[Value]] = {}
        for name, parameter in parameters.items():
            value = (given or {}).get(name, parameter.default)
            many = isinstance(value, (list, tuple))
            if many and not parameter.each:
                raise UsageError(f"{name} is one for all", "give a single value")
            if many and len(value) != count:
                raise UsageError(f"{name} has {len(value)} values for {count} differences", "give one, or one for each")
            if parameter.each:
                self._each[name] = [parameter.read(name, v) for v in (value if many else [value] * count)]
            else:
                self._shared[name] = parameter.read(name, value)

    def __getitem__(self, name: str) -> Any:
        """A value that all share."""
        return self._shared[name]

    def each(self, name: str) -> list[Any]:
        """One value for each difference."""
        return self._each[name]

    def ordered(self, order: Sequence[int]) -> Settings:
        """The same, for the differences in another order."""
        other = copy.copy(self)
        other._each = {name: [values[i] for i in order] for name, values in self._each.items()}
        return other

    def record(self) -> dict[str, Any]:
        """All of them as JSON, for a header."""
        return {**self._shared, **self._each}


@dataclass(frozen=True, slots=True)
class Deltas:
    """The differences that are merged, in an order that does not depend on how the user gave them.

    Attributes:
        sources: one for each, of fp32 tensors (fp64 for fp64 tensors); one that lacks a tensor is zero there.
        ids: which each is; randomness depends on it.
        weights: one for each; fp32 numbers.
        specs: all tensors, in the dtype that is computed in.
    """

    sources: Sequence[Source]
    ids: Sequence[str]
    weights: Sequence[float]
    specs: Mapping[str, TensorSpec]
    resources: Resources

    def holders(self, name: str) -> list[int]:
        """Which have that tensor."""
        return [i for i, source in enumerate(self.sources) if name in source.specs]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is computed in."""
        dtype = self.specs[name].type.torch
        assert dtype is not None
        return dtype

    def read(self, index: int, name: str, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        """Fills `out` (flat, in `dtype(name)`) with elements [start, stop) of one difference."""
        source = self.sources[index]
        if source.specs[name].dtype == self.specs[name].dtype:
            read_values(source, name, start, stop, out.view(torch.uint8))
            return
        raw = workspace.buffer("delta", (stop - start) * source.specs[name].type.itemsize, torch.uint8)
        out.copy_(read_values(source, name, start, stop, raw))
