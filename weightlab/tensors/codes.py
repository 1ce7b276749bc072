"""Codes: what a quantised checkpoint stores in place of weights, and the scales that belong to them.

A sum of codes, or of their scales alone, is no sum of weights. They are copied, or changed bit for bit by a patch that
has all that changed of one module. What is refused is said here, for all commands alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightlab.errors import MisfitError
from weightlab.tensors.order import natural_key
from weightlab.tensors.spec import TensorSpec

REMEDY = "take the model before it was quantised, or put the patch on a dequantised copy"


@dataclass(frozen=True, slots=True)
class Code:
    """What a tensor is a part of.

    Attributes:
        kind: how its weights are stored, in words.
        module: what is stored so: the name of a module, or of a tensor without its `.weight`. What has the same one
            stands or falls together.
    """

    kind: str
    module: str


class Coded(Protocol):
    """What is asked of a source here; see `weightlab.sources.Source`."""

    label: str
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    codes: Mapping[str, Code]


def codes_met(source: Coded, names: Iterable[str]) -> dict[str, Code]:
    """Of these names those that are codes in a source, or whose weight is there in codes only."""
    if not source.codes:
        return {}
    modules = {code.module: code for code in source.codes.values()}
    found: dict[str, Code] = {}
    for name in names:
        stored = source.aliases.get(name, name)
        code = source.codes.get(stored)
        if code is None and stored not in source.specs:
            code = modules.get(name) or (modules.get(name[: -len(".weight")]) if name.endswith(".weight") else None)
        if code is not None:
            found[name] = code
    return found


def refusal(source: Coded, *more: Coded, names: Iterable[str]) -> MisfitError:
    """The error for arithmetic on names that are codes, or tensors of integers.

    Args:
        more: other sources in which they may be codes.
    """
    lines: dict[str, None] = {}
    labels: dict[str, None] = {}
    left = dict.fromkeys(names)
    for every in (source, *more):
        met = codes_met(every, left)
        lines |= dict.fromkeys(described(every, met))
        labels |= {every.label: None} if met else {}
        left = {name: None for name in left if name not in met}
    owners = {name: _with_integers((source, *more), name) for name in left}
    others = [str(s.specs.get(s.aliases.get(name, name), name)) for name, s in owners.items()]
    if not labels:
        label = next(iter(owners.values()), source).label
        return MisfitError(f"{label}: no sums are defined on tensors of integers", "leave these out", others)
    return MisfitError(
        f"{', '.join(labels)}: these weights are codes of a quantised checkpoint, on which no sums are defined, and "
        "requantising is not done yet",
        REMEDY,
        [*lines, *others],
    )


def _with_integers(sources: Sequence[Coded], name: str) -> Coded:
    """The first that has a tensor of integers under a name."""
    for source in sources:
        spec = source.specs.get(source.aliases.get(name, name))
        if spec is not None and not spec.is_float:
            return source
    return sources[0]


def described(source: Coded, met: Mapping[str, Code]) -> list[str]:
    """A line for each: the tensor, its kind, and what belongs to it."""
    parts = _by_module(source.codes)
    lines = []
    for name, code in met.items():
        stored = source.aliases.get(name, name)
        others = [part.removeprefix(f"{code.module}.") for part in parts[code.module] if part != stored]
        beside = f", with {', '.join(others)}" if others else ""
        lines.append(f"{source.specs.get(stored, name)}: {code.kind}{beside}")
    return lines


def require_same_form(one: Coded, other: Coded) -> None:
    """Checks that no weight is in codes in one of two checkpoints and a plain tensor in the other.

    Raises:
        MisfitError: lists them with their scales.
    """
    for coded, plain in ((one, other), (other, one)):
        modules = {code.module: name for name, code in coded.codes.items()}
        met: dict[str, Code] = {}
        for module, name in modules.items():
            for weight in (module, f"{module}.weight"):
                spec = plain.specs.get(plain.aliases.get(weight, weight))
                there = coded.specs.get(weight)
                if spec is None or weight in plain.codes or not spec.is_float or (there and there.dtype == spec.dtype):
                    continue
                met[weight if there else name] = coded.codes[name]
        if met:
            raise MisfitError(
                f"one is in codes, the other is not: {coded.label} is quantised, {plain.label} is not",
                f"take {coded.label} before it was quantised, or dequantise it (weights times scales); requantising is "
                "not done yet",
                described(coded, met),
            )


def separated(codes: Mapping[str, Code], chosen: Collection[str], left: Collection[str]) -> dict[str, list[str]]:
    """Modules of which some codes or scales are chosen and others are left out: {module: those left out}."""
    begun = {codes[name].module for name in chosen if name in codes}
    found: dict[str, list[str]] = {}
    for name in left:
        if name in codes and codes[name].module in begun:
            found.setdefault(codes[name].module, []).append(name)
    return found


def separation(label: str, left: Mapping[str, Collection[str]]) -> MisfitError:
    """The error for what `separated` found."""
    return MisfitError(
        f"{label}: these belong to codes that are chosen, and are left out; one without the other is garbage",
        "choose them too, or leave out their modules whole",
        sorted((name for names in left.values() for name in names), key=natural_key),
    )


def _by_module(codes: Mapping[str, Code]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name, code in codes.items():
        parts.setdefault(code.module, []).append(name)
    return parts
