"""Kinds of input for the fuzzer: how a valid one is made, which of its files are changed and how, what then reads it.

A new kind is a function in one of the `samples_*` modules: it makes a valid input in an empty folder, and says with
`@kind` the rest. All that a reader may raise is a `WeightlabError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.fuzz.mutations import Mutation

Make = Callable[[Path], None]
Reader = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of input.

    Attributes:
        make: writes a valid input to an empty folder; once in a process.
        spoiled: {glob in that folder: the mutation for such a file}; one file is changed at a time.
        readers: {name: what a command would call}, each given a fresh copy of the folder.
        share: how many of the inputs are of this kind, next to the others' shares; slow ones have less.
    """

    name: str
    make: Make
    spoiled: Mapping[str, Mutation]
    readers: Mapping[str, Reader]
    share: int = 4


KINDS: dict[str, Kind] = {}
_MODULES = (
    *("models", "parts", "patches", "stacks", "texts", "pickles", "twins"),
    *("adapters", "forms", "peft"),
)


def kind(
    name: str, spoiled: Mapping[str, Mutation], readers: Mapping[str, Reader], share: int = 4
) -> Callable[[Make], Make]:
    """Registers the decorated function as what makes that kind."""

    def register(make: Make) -> Make:
        if name in KINDS:
            raise ValueError(f"two kinds called {name}")
        KINDS[name] = Kind(name, make, spoiled, readers, share)
        return make

    return register


def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    for module in _MODULES:
        import_module(f"tests.fuzz.samples_{module}")
    return KINDS


def of_seed(seed: int) -> Kind:
    """Which kind the input with that number is of."""
    wheel = [each for each in kinds().values() for _ in range(each.share)]
    return wheel[seed % len(wheel)]
