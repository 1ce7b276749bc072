"""How much of each expert a sample gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightlab.errors import UsageError


def mixture_of(
    weights: Tensor | Sequence[Any], names: Sequence[str], device: torch.device, top_k: int | None, group: bool
) -> Tensor:
    """Weights as fp32 [samples, T], or [1, T] for all samples.

    Args:
        weights: [samples, T], or [T] for all samples.
        names: the experts, in the order of the weights.
        top_k: only so many of the largest are kept, see `only_largest`.
        group: one mixture for all samples, the mean of theirs.

    Raises:
        UsageError: they have another shape, or are not finite.
    """
    mixture = torch.as_tensor(weights, dtype=torch.float32, device=device)
    if mixture.ndim == 1:
        mixture = mixture[None]
    if mixture.ndim != 2 or mixture.shape[1] != len(names):
        raise UsageError(
            f"weights {list(mixture.shape)} for {len(names)} experts",
            "give [samples, experts], or [experts] for all samples",
            names,
        )
    if not bool(torch.isfinite(mixture).all()):
        raise UsageError("weights are not finite", "give numbers")
    if top_k is not None:
        mixture = only_largest(mixture, top_k)
    return mixture.mean(0, keepdim=True) if group else mixture


def only_largest(weights: Tensor, count: int) -> Tensor:
    """Weights [samples, T] of which all but the `count` largest are 0, scaled to the sum that they had.

    Raises:
        UsageError: `count` is not from 1 to T.
    """
    if not 1 <= count <= weights.shape[1]:
        raise UsageError(f"top_k {count} of {weights.shape[1]} experts", f"give 1 to {weights.shape[1]}")
    values, places = weights.topk(count, dim=1)
    kept = torch.zeros_like(weights).scatter(1, places, values)
    sums, wanted = kept.sum(1, keepdim=True), weights.sum(1, keepdim=True)
    return torch.where(sums == 0, kept, kept * wanted / sums)
