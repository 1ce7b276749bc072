"""What LyCORIS's kinds do to a tensor: products of products, and DoRA over any of them.

Source: LyCORIS (arXiv 2309.14859) for LoHa, LoKr and their Tucker forms; DoRA is arXiv 2402.09353.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlab.adapters.changes import Change


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix, or the kernel of a convolution, in factors.

    Attributes:
        left: [m, r]; with a core [r, m].
        right: [r, n] or [r, in, height, width]; with a core [r, in].
        core: None, or of a Tucker decomposition: [r, r, height, width].
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None

    @property
    def problem(self) -> str:
        """Why the factors cannot be multiplied; empty when they can."""
        ranks = (self.left.shape[1:2], self.right.shape[:1])
        if self.core is not None:
            ranks = (self.left.shape[:1] + self.right.shape[:1], self.core.shape[:2])
            if self.core.ndim < 3:
                return f"its core is {list(self.core.shape)}"
        sizes = f"factors of {list(self.left.shape)} and {list(self.right.shape)}"
        flat = self.left.ndim == 2 and self.right.ndim >= 2 and (self.core is None or self.right.ndim == 2)
        return "" if flat and ranks[0] == ranks[1] and self.left.numel() and self.right.numel() else sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """[m, n], or with a core [m, in, height, width]."""
        if self.core is not None:
            return (self.left.shape[1], self.right.shape[1], *self.core.shape[2:])
        return (self.left.shape[0], *self.right.shape[1:])

    def whole(self) -> Tensor:
        if self.core is None:
            return (self.left @ self.right.flatten(1)).reshape(self.sizes)
        return torch.einsum("ij...,ip,jr->pr...", self.core, self.left, self.right)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices, scaled."""

    one: LowRank
    two: LowRank
    scale: float
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        for factor in (self.one, self.two):
            sizes = factor.sizes
            if (sizes[0], math.prod(sizes[1:])) != (shape[:1] or (1,))[0:1] + (math.prod(shape[1:]),):
                return f"its factors make {list(sizes)}"
        return ""

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        return delta.add_((self.one.whole().flatten(1) * self.two.whole().flatten(1)).reshape(delta.shape) * self.scale)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: the Kronecker product of a matrix [a, b] and a matrix or kernel [c, d, ...], scaled.

    Attributes:
        two: [c, d], [c, d, height, width] or [c, d · height · width].
    """

    one: Tensor
    two: Tensor
    scale: float
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        a, b = self.one.shape
        fits = (
            len(shape) >= 2
            and self._inner(shape) > 0
            and (a * self.two.shape[0], b)
            == (
                shape[0],
                shape[1] // self._inner(shape),
            )
        )
        whole = fits and self.two.numel() == self.two.shape[0] * self._inner(shape) * math.prod(shape[2:])
        return "" if whole else f"its factors are {list(self.one.shape)} and {list(self.two.shape)}"

    def _inner(self, shape: tuple[int, ...]) -> int:
        """d, of a tensor of that shape; 0 where it does not come out even."""
        b = self.one.shape[1]
        return shape[1] // b if b and shape[1] % b == 0 else 0

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        kernel = self.two.reshape(self.two.shape[0], self._inner(tuple(delta.shape)), -1)
        product = torch.einsum("ab,cdk->acbdk", self.one, kernel)
        return delta.add_(product.reshape(delta.shape) * self.scale)


@dataclass(frozen=True, slots=True)
class Lengths:
    """DoRA over any change: what is in a row of W + Δ (or in a column) gets a trained length.

    Attributes:
        magnitude: [m] or [m, 1, ...]: of all that goes to one output; [1, n, ...]: of all that comes from one input.
    """

    change: Change
    magnitude: Tensor
    needs_base: bool = True

    def problem(self, shape: tuple[int, ...]) -> str:
        if self.change.problem(shape):
            return self.change.problem(shape)
        return "" if self._axis(shape) is not None else f"its magnitudes are {list(self.magnitude.shape)}"

    def _axis(self, shape: tuple[int, ...]) -> int | None:
        mine, count = tuple(self.magnitude.shape), self.magnitude.numel()
        if len(shape) < 2:
            return None
        if len(mine) >= 2 and mine[0] == 1 and count == mine[1] == shape[1]:
            return 1
        return 0 if mine and mine[0] == count == shape[0] else None

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        assert base is not None
        axis = self._axis(tuple(delta.shape))
        moved = self.change.onto(base + delta, base)
        along = tuple(d for d in range(moved.ndim) if d != axis)
        lengths = moved.square().sum(dim=along, keepdim=True).sqrt_()
        wanted = self.magnitude.reshape(lengths.shape)
        return moved.mul_(torch.where(lengths == 0, torch.zeros(()), wanted / lengths)).sub_(base)


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference as it is, in a shape of as many elements."""

    values: Tensor
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        mine = tuple(self.values.shape)
        return "" if mine == shape or _without_ones(mine) == _without_ones(shape) else f"its values are {list(mine)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        return delta.add_(self.values.reshape(delta.shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
