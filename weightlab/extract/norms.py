"""Normalisation layers with running statistics (BatchNorm and its like), as tensor names show them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from weightlab.errors import UsageError

NormMode = Literal["keep", "robust", "blend", "recalibrate"]
STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")


def parse_norm(text: str) -> tuple[NormMode, float]:
    """A mode and its share of the robust model: `keep`, `robust`, `blend:0.5`, `recalibrate`.

    Raises:
        UsageError: it is none of these.
    """
    name, sign, number = text.partition(":")
    modes = get_args(NormMode)
    try:
        share = float(number) if sign else 1.0
    except ValueError:
        share = -1.0
    if name not in modes or bool(sign) != (name == "blend") or not 0 <= share <= 1:
        raise UsageError(f"--norm {text} is not understood", "write keep, robust, blend:SHARE (0 to 1) or recalibrate")
    return name, share  # type: ignore[return-value]


def norm_tensors(names: Collection[str]) -> tuple[list[str], list[str]]:
    """(affine weights and biases, running statistics) of every layer that has running statistics."""
    owners = dict.fromkeys(n.rpartition(".")[0] for n in names if n.rpartition(".")[2] == STATISTICS[0])

    def of(parts: Collection[str]) -> list[str]:
        return [full for owner in owners for part in parts if (full := f"{owner}.{part}".lstrip(".")) in names]

    return of(_AFFINE), of(STATISTICS)
