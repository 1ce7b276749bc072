"""Pairing two sets of tensors by name, finding ALL that does not fit before anything is read or written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from weightlab.errors import NamesMismatchError
from weightlab.tensors.order import natural_key
from weightlab.tensors.spec import TensorSpec

Allowance = Literal["added", "removed", "rows"]
ALLOWANCES: tuple[Allowance, ...] = ("added", "removed", "rows")


@dataclass(slots=True)
class Pairing:
    """Names in natural order: in both, only in the tuned one (added), only in the base (removed)."""

    both: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def extends_rows(base: TensorSpec, tuned: TensorSpec) -> bool:
    """Whether `tuned` is `base` with rows appended: the same columns, more rows, which a vector has too."""
    return (
        len(base.shape) == len(tuned.shape) >= 1
        and base.shape[1:] == tuned.shape[1:]
        and tuned.shape[0] > base.shape[0]
    )


def pair(
    base: Mapping[str, TensorSpec],
    tuned: Mapping[str, TensorSpec],
    *,
    base_label: str,
    tuned_label: str,
    allow: Collection[str] = (),
) -> Pairing:
    """Pairs the tensors of two checkpoints.

    Float dtypes may differ. Anything else that differs must be allowed by name: `added` and `removed` tensors,
    `rows` appended to a matrix.

    Raises:
        NamesMismatchError: lists every missing, extra, mis-shaped and mistyped tensor.
    """
    pairing = Pairing()
    problems: list[str] = []
    needed: set[str] = set()
    for name in sorted({*base, *tuned}, key=natural_key):
        if name not in tuned:
            pairing.removed.append(name)
            if "removed" not in allow:
                problems.append(f"{base[name]}: only in {base_label}")
                needed.add("removed")
        elif name not in base:
            pairing.added.append(name)
            if "added" not in allow:
                problems.append(f"{tuned[name]}: only in {tuned_label}")
                needed.add("added")
        else:
            problem = misfit(base[name], tuned[name], "rows" in allow)
            if problem:
                problems.append(problem)
                needed.add("rows" if extends_rows(base[name], tuned[name]) else "")
            pairing.both.append(name)
    if problems:
        raise NamesMismatchError(
            f"{tuned_label} does not fit {base_label}: {len(problems)} of {len({*base, *tuned})} tensors differ",
            _remedy(needed),
            problems,
        )
    return pairing


def misfit(base: TensorSpec, tuned: TensorSpec, rows: bool) -> str:
    """Why `tuned` cannot be paired with `base`; empty when it can."""
    if base.shape != tuned.shape and not (rows and extends_rows(base, tuned)):
        hint = " (rows appended)" if extends_rows(base, tuned) else ""
        return f"{base.name}: shape {list(base.shape)} against {list(tuned.shape)}{hint}"
    if base.dtype != tuned.dtype and not (base.is_float and tuned.is_float):
        return f"{base.name}: dtype {base.dtype} against {tuned.dtype}"
    return ""


def _remedy(needed: set[str]) -> str:
    if "" in needed:
        return "check that both come from the same architecture and size"
    options = " ".join(f"--allow {kind}" for kind in sorted(needed))
    return f"check that both come from the same architecture; if the difference is meant, pass {options}"
