"""Inferring how the names of one checkpoint became those of another, from both sets of names and shapes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightlab.errors import NamesMismatchError
from weightlab.tensors.select import rename
from weightlab.tensors.spec import TensorSpec

Renames = Mapping[str, str] | Literal["auto"]
"""{old: new} as `rename` takes it, or "auto": what `resolve` infers."""

# Components that wrappers put into names: torch.compile, DDP, FSDP, activation checkpointing, PEFT.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
# TensorFlow's words for the parameters of a norm, which the first BERT checkpoints have, and torch's.
_NORMS = {"gamma": "weight", "beta": "bias", "weight": "gamma", "bias": "beta"}
_TYPED = 12  # more options than that no one types
_PROBES, _CANDIDATES, _EXCEPTIONS, _STEPS = 4, 12, 8, 3


@dataclass(frozen=True, slots=True)
class Found:
    """A renaming, and how many tensors have a partner of their name and shape with it."""

    renames: Mapping[str, str]
    paired: int


def infer(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[Found]:
    """The renamings of `given` that let most tensors pair up by name and shape, at least half of the smaller set.

    Time is linear in the tensors. Several that do equally well, and not the same, are all returned: the choice is the
    user's. A renaming never takes away a partner that a tensor has under its own name.

    Returns:
        none, one, or several that are equally good.
    """
    before = _paired(given, {n: n for n in given}, wanted)
    start = _wrappers(given, wanted) | norm_renames(given, wanted)
    inside = _put_in(given, wanted)
    beam: list[dict[str, str]] = [start, *([inside] if inside else [])]
    best: list[Found] = []
    for _ in range(_STEPS):
        grown: dict[tuple[tuple[str, str], ...], Found] = {}
        for rules in beam:
            for candidate in [rules, *_with_prefixes(given, wanted, rules)]:
                paired = _score(given, wanted, candidate)
                if candidate and paired is not None and paired > before:
                    grown[tuple(sorted(candidate.items()))] = Found(candidate, paired)
        top = max((f.paired for f in grown.values()), default=0)
        if not top or (best and top <= best[0].paired):
            break
        best = [f for f in grown.values() if f.paired == top]
        if top == min(len(given), len(wanted)):
            break
        beam = [dict(f.renames) for f in best]
    if not best or 2 * best[0].paired < min(len(given), len(wanted)):
        return []
    distinct: dict[tuple[str, ...], Found] = {}
    for found in best:
        shown = tuple(rename(given, found.renames).values())
        known = distinct.get(shown)
        if known is None or len(found.renames) < len(known.renames):
            distinct[shown] = found
    return list(distinct.values())


def resolve(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], renames: Renames | None
) -> dict[str, str]:
    """The renaming that is meant: as it is given, or for "auto" the one that `infer` finds, empty without need.

    Raises:
        NamesMismatchError: for "auto", none is found although names differ, or several are equally good.
    """
    if renames != "auto":
        return dict(renames or {})
    found = infer(given, wanted)
    if len(found) == 1:
        return dict(found[0].renames)
    if found:
        raise NamesMismatchError(
            f"--map auto: {len(found)} renamings pair up {found[0].paired} tensors each",
            "pass the one that is meant",
            [options(f.renames) for f in found],
        )
    if not given.keys() & wanted.keys():
        raise NamesMismatchError("--map auto finds no renaming that pairs the tensors up", "pass --map OLD=NEW")
    return {}


def norm_renames(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> dict[str, str]:
    """LayerNorm's gamma and beta against weight and bias: only under parents where `wanted` really has the other."""
    rules: dict[str, str] = {}
    tails = {".".join(name.split(".")[-2:]) for name in wanted}
    for name in given:
        *_, parent, last = ("", "", *name.split("."))
        old, new = f"{parent}.{last}", f"{parent}.{_NORMS.get(last, '')}"
        if "norm" in parent.lower() and last in _NORMS and new in tails and old not in tails:
            rules[f".{old}"] = f".{new}"
    return rules


def other_norm(name: str) -> str | None:
    """The same parameter in the other spelling: LayerNorm's gamma for its weight, beta for bias; None for others."""
    parent, dot, last = name.rpartition(".")
    return f"{parent}.{_NORMS[last]}" if dot and last in _NORMS else None


def with_norms(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], rules: Mapping[str, str]
) -> dict[str, str]:
    """`rules`, and norms' two spellings paired up, in exactly those modules of which `wanted` has the other only.

    Raises:
        NamesMismatchError: see `rename`.
    """
    shown = rename(given, rules, idle=False)
    taken = set(shown.values())
    norms: dict[str, str] = {}
    for name, now in shown.items():
        other = other_norm(now)
        if other is None or now in wanted or other not in wanted or other in taken:
            continue
        if wanted[other].shape == given[name].shape:
            norms[name] = other
    if not norms:
        return dict(rules)
    goal = {**shown, **norms}
    short = dict(rules)
    for name, other in norms.items():
        short["." + ".".join(shown[name].split(".")[-2:])] = "." + ".".join(other.split(".")[-2:])
    if _renamed(given, short) == goal:
        return short
    inner = rename(given, {old: new for old, new in rules.items() if old.startswith(".")}, idle=False)
    exact = {**rules, **{inner[name]: other for name, other in norms.items()}}
    got = _renamed(given, exact) or {}
    return exact | {inner[name]: goal[name] for name in given if got.get(name) != goal[name]}


def options(renames: Mapping[str, str]) -> str:
    """What to type for a renaming."""
    return " ".join(f"--map {shlex.quote(f'{old}={new}')}" for old, new in sorted(renames.items()))


def _wrappers(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Wrappers' components that `given` has and `wanted` has nowhere, each to be taken out."""
    mine, theirs = _components(given), _components(wanted)
    gone = [w for w in _WRAPPERS if w in mine and w not in theirs]
    rules: dict[str, str] = {}
    heads = {name.split(".", 1)[0] for name in given}
    for wrapper in gone:
        inside = any(f".{wrapper}." in name for name in given)
        rules[f".{wrapper}" if inside or wrapper not in heads else f"{wrapper}."] = ""
    if len(gone) > 1:  # `module._orig_mod.` before every name is one prefix
        first = next(iter(given))
        parts = first.split(".")
        count = next((i for i, part in enumerate(parts) if part not in gone), 0)
        joined = ".".join(parts[:count]) + "."
        if count == len(gone) and all(n.startswith(joined) for n in given):
            return {joined: ""}
    return rules


def _put_in(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Wrappers' components that `wanted` has inside its names and `given` lacks: a prefix for every such place."""
    mine = _components(given)
    rules: dict[str, str] = {}
    for name in wanted:
        parts = name.split(".")
        wrapped = [i for i, part in enumerate(parts) if part in _WRAPPERS and part not in mine]
        if wrapped and wrapped[-1] > 0:
            head = parts[: wrapped[-1] + 1]
            plain = "".join(f"{p}." for i, p in enumerate(head) if i not in wrapped)
            if rules.setdefault(plain, "".join(f"{p}." for p in head)) != "".join(f"{p}." for p in head):
                return {}  # two places under one name
    return rules


def _components(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".")}


def _with_prefixes(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], rules: Mapping[str, str]
) -> list[dict[str, str]]:
    """`rules` and one more prefix, for every prefix that would give a few of the lonely names a partner."""
    shown = _renamed(given, rules)
    if shown is None:
        return []
    lonely = [n for n, s in shown.items() if s not in wanted]
    lonely.sort(key=lambda n: n.count("."), reverse=True)
    step = max(1, len(lonely) // _PROBES)
    scored: dict[tuple[str, str], int] = {}
    for name in lonely[::step][:_PROBES]:
        parts = shown[name].split(".")
        for other, spec in wanted.items():
            if spec.shape != given[name].shape or not other.endswith(parts[-1]):
                continue
            theirs = other.split(".")
            common = 0
            while common < min(len(parts), len(theirs)) and parts[-1 - common] == theirs[-1 - common]:
                common += 1
            if common and (common > 1 or len(parts) == 1 or len(theirs) == 1):
                old, new = ("".join(f"{p}." for p in part[: len(part) - common]) for part in (parts, theirs))
                scored[old, new] = max(scored.get((old, new), 0), common)
    ranked = sorted(scored, key=lambda pair: -scored[pair])[:_CANDIDATES]
    return [extended for old, new in ranked if (extended := _extended(given, wanted, rules, old, new)) is not None]


def _extended(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], rules: Mapping[str, str], old: str, new: str
) -> dict[str, str] | None:
    """`rules` and a prefix; names that have a partner already are kept from it, a few by name."""
    if old in rules:
        return None
    more = {**rules, old: new}
    kept = [n for n in given if n.startswith(old) and n in wanted and new + n[len(old) :] not in wanted]
    if len(kept) > _EXCEPTIONS:
        return None
    return more | {n: n for n in kept}


def _score(given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], rules: Mapping[str, str]) -> int | None:
    shown = _renamed(given, rules)
    return None if shown is None else _paired(given, shown, wanted)


def _renamed(given: Mapping[str, TensorSpec], rules: Mapping[str, str]) -> Mapping[str, str] | None:
    """None where two tensors would get one name."""
    try:
        return rename(given, rules, idle=False)
    except NamesMismatchError:
        return None


def _paired(given: Mapping[str, TensorSpec], shown: Mapping[str, str], wanted: Mapping[str, TensorSpec]) -> int:
    return sum(1 for n, s in shown.items() if s in wanted and wanted[s].shape == given[n].shape)


def remedy(found: Sequence[Found]) -> str:
    """What an error tells to do about names that differ by a renaming."""
    if len(found) == 1 and len(found[0].renames) > _TYPED:
        some = dict(sorted(found[0].renames.items())[:1])
        return f"pass --map auto, which is {len(found[0].renames)} renamings such as {options(some)}"
    if len(found) == 1:
        return f"pass {options(found[0].renames)} (or --map auto)"
    return "pass the renaming that is meant: " + ", or ".join(options(f.renames) for f in found)
