"""The family of task arithmetic: what is kept of each difference, weighted, added up, with or without a vote on signs.

    Σᵢ wᵢ·kept(Δᵢ)                              without a vote
    Σᵢ wᵢ·kept(Δᵢ) over those i that agree      where wᵢ·kept(Δᵢ) has the sign of the sum of all; signs that tie are +

divided by the sum of the weights that went in (`normalize`), times λ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightlab.methods._base import Deltas, Parameter, Settings
from weightlab.methods._kept import Choice, Kept
from weightlab.sources.virtual.computed import Compute
from weightlab.tensors.arithmetic import is_finite
from weightlab.tensors.workspace import Workspace, WorkspaceOfThread

_NOTHING = 1e-8
"""Sums of weights below this are not divided by, as in mergekit."""


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """One of the family.

    Attributes:
        keep: how elements are chosen that are kept; None: all are.
        vote: whether only those count that agree with the majority's sign.
        normalize, rescale: the defaults.
        parameters: what a user may set.
    """

    keep: Choice | None = None
    vote: bool = False
    normalize: bool = False
    rescale: bool = False
    parameters: Mapping[str, Parameter] = field(init=False)

    def __post_init__(self) -> None:
        has: dict[str, Parameter] = {"normalize": Parameter(self.normalize), "lambda": Parameter(1.0)}
        if self.keep is not None:
            has |= {"density": Parameter(1.0, each=True, least=0.0, most=1.0), "rescale": Parameter(self.rescale)}
            has |= {"scope": Parameter("tensor", choices=("tensor", "model"))}
        if self.keep == "random":
            has |= {"seed": Parameter(0)}
        if self.vote:
            has |= {"int8_mask": Parameter(False)}  # of mergekit's files; what it saves there takes no memory here
        object.__setattr__(self, "parameters", has)

    def begin(self, deltas: Deltas, settings: Settings) -> Compute:
        kept = None
        if self.keep is not None:
            seed = settings["seed"] if self.keep == "random" else 0
            shares, rescale, scope = settings.each("density"), settings["rescale"], settings["scope"]
            kept = Kept(deltas, shares, self.keep, rescale=rescale, scope=scope, seed=seed)
        return _Merge(deltas, kept or deltas, self.vote, settings["normalize"], settings["lambda"])


class _Merge:
    """Computes tiles."""

    def __init__(self, deltas: Deltas, kept: Kept | Deltas, vote: bool, normalize: bool, factor: float) -> None:
        self._deltas, self._kept, self._vote = deltas, kept, vote
        self._normalize, self._factor = normalize, factor
        self._own = WorkspaceOfThread()

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        workspace = self._own.workspace
        merged = self._voted(name, start, stop, workspace) if self._vote else self._sum(name, start, stop, workspace)
        if self._factor != 1.0:
            merged.mul_(self._factor)
        return merged

    def _sum(self, name: str, start: int, stop: int, workspace: Workspace) -> Tensor:
        dtype = self._deltas.dtype(name)
        total = workspace.buffer("total", stop - start, dtype)
        term = workspace.buffer("term", stop - start, dtype)
        total.zero_()
        for index in self._deltas.holders(name):
            self._weighted(index, name, start, stop, term, workspace)
            total.add_(term)
        if self._normalize:
            weight = sum(self._deltas.weights)
            if abs(weight) >= _NOTHING:
                total.div_(weight)
        return total

    def _voted(self, name: str, start: int, stop: int, workspace: Workspace) -> Tensor:
        """Two rounds over the terms, which are kept meanwhile: their sum, then those that agree with its sign.

        Signs are numbers, 1 or -1: with bools torch takes several times as long.
        """
        dtype, size = self._deltas.dtype(name), stop - start
        total, divisor, sign = (workspace.buffer(key, size, dtype) for key in ("total", "divisor", "sign"))
        holders = self._deltas.holders(name)
        terms = workspace.buffer("terms", size * len(holders), dtype).view(len(holders), size)
        total.zero_()
        for term, index in zip(terms, holders, strict=True):
            self._weighted(index, name, start, stop, term, workspace)
            total.add_(term)
        torch.copysign(torch.ones(1, dtype=dtype), total, out=sign)  # 0 + -0 is 0, whose sign is +
        if not is_finite(total):
            sign.masked_fill_(total.isnan(), torch.nan)  # no majority, where both infinities are
        total.zero_()
        divisor.zero_()
        for term, index in zip(terms, holders, strict=True):
            total.add_(term.mul_(sign).clamp_min_(0))
            if self._normalize:
                divisor.add_(term.sign_().mul_(self._deltas.weights[index]))
        if self._normalize:
            weights = [self._deltas.weights[index] for index in holders]
            if min(weights) > 0:
                divisor.clamp_min_(min(weights))
            else:
                divisor.masked_fill_(divisor == 0, 1)
            total.div_(divisor)
        # Where the sign is -, some term is negative, so that no 0 becomes -0 here.
        return total.mul_(sign)

    def _weighted(self, index: int, name: str, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        self._kept.read(index, name, start, stop, out, workspace)
        weight = self._deltas.weights[index]
        if weight != 1.0:
            out.mul_(weight)
