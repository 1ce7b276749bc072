"""What an adapter does to one tensor: adds a product of two factors, or puts values in its place.

Scaled factors give Δ = scaling · B·A (LoRA: arXiv 2106.09685). `modules_to_save`, biases, trained tokens and saved
embeddings are values, not differences: their Δ is value − base, so it needs the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """One change of one tensor."""

    @property
    def needs_base(self) -> bool:
        """Whether the difference depends on the tensor that it is put on."""

    def problem(self, shape: tuple[int, ...]) -> str:
        """Why it does not fit a tensor of that shape; empty when it does."""

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        """`delta` (fp32, in the tensor's shape) with this change. `base`: the tensor in fp32, where it is known."""


@dataclass(frozen=True, slots=True)
class Product:
    """left [m, r] · right [r, n], in the shape of the tensor; convolutions are [out, in · height · width]."""

    left: Tensor
    right: Tensor
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        m, n = self.left.shape[0], self.right.shape[1]
        return "" if len(shape) >= 2 and (m, n) == (shape[0], math.prod(shape[1:])) else f"its factors make [{m}, {n}]"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        return delta.add_((self.left @ self.right).reshape(delta.shape))


@dataclass(frozen=True, slots=True)
class Dora:
    """DoRA (arXiv 2402.09353): the rows of W + ΔLoRA, each with a trained length.

    Attributes:
        magnitude: [m]; with `transposed`, of the columns.
    """

    product: Product
    magnitude: Tensor
    transposed: bool
    needs_base: bool = True

    def problem(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return "DoRA on what is no matrix is not computed here"
        rows = shape[1] if self.transposed else shape[0]
        return self.product.problem(shape) or ("" if self.magnitude.numel() == rows else "its magnitudes do not fit")

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        assert base is not None
        along = 0 if self.transposed else 1
        moved = self.product.onto(base + delta, None)
        lengths = moved.norm(dim=along, keepdim=True)
        return moved.mul_(self.magnitude.reshape(lengths.shape) / lengths).sub_(base)


@dataclass(frozen=True, slots=True)
class Stacked:
    """LoRA on a parameter itself: a matrix [out, in], or the stacked matrices of experts, [experts, ·, ·].

    Attributes:
        down: A, [rank · experts, in].
        up: B, [out, rank · experts].
        scaling: from a rank.
        in_first: whether an expert's matrix is [in, out]; None: its shape tells.
    """

    down: Tensor
    up: Tensor
    scaling: Callable[[int], float]
    in_first: bool | None = None
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        sizes = (self.up.shape[0], self.down.shape[1])
        if len(shape) == 2:
            return "" if shape == sizes else f"its factors make {list(sizes)}"
        if len(shape) != 3 or self.down.shape[0] % shape[0]:
            return f"its factors are for stacked matrices of {list(sizes)}"
        if self.in_first is None and sizes[0] == sizes[1]:
            return "its matrices are square, so the network must say which way they lie"
        fits = {None: (sizes, sizes[::-1]), False: (sizes,), True: (sizes[::-1],)}[self.in_first]
        return "" if shape[1:] in fits else f"its factors make {list(sizes)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        experts = delta.shape[0] if delta.ndim == 3 else 1
        down = self.down.reshape(experts, -1, self.down.shape[1])
        up = self.up.reshape(self.up.shape[0], -1, experts).permute(2, 0, 1) * self.scaling(down.shape[1])
        if delta.ndim == 2:
            return delta.add_(up[0] @ down[0])
        in_first = self.in_first if self.in_first is not None else delta.shape[1] != self.up.shape[0]
        for expert in range(experts):  # one product at a time, and no tensor as large as all
            product = up[expert] @ down[expert]
            delta[expert] += product.T if in_first else product
        return delta


@dataclass(frozen=True, slots=True)
class Values:
    """New values of the whole tensor, perhaps with more rows."""

    values: Tensor
    needs_base: bool = True

    def problem(self, shape: tuple[int, ...]) -> str:
        mine = tuple(self.values.shape)
        grown = len(mine) == len(shape) and len(mine) > 0 and mine[1:] == shape[1:] and mine[0] >= shape[0]
        return "" if mine == shape or grown else f"its values are {list(mine)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        assert base is not None
        return delta.add_(self.values).sub_(base)


@dataclass(frozen=True, slots=True)
class Rows:
    """New values of some rows of an embedding."""

    places: tuple[int, ...]
    values: Tensor
    needs_base: bool = True

    def problem(self, shape: tuple[int, ...]) -> str:
        if len(self.places) != self.values.shape[0]:
            return f"{len(self.places)} trained tokens and {self.values.shape[0]} rows"
        inside = all(0 <= place < shape[0] for place in self.places)
        return "" if inside and shape[1:] == tuple(self.values.shape[1:]) else f"its rows are {list(self.values.shape)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        assert base is not None
        places = torch.tensor(self.places)
        delta[places] = self.values - base[places]
        return delta


@dataclass(frozen=True, slots=True)
class Addition:
    """A difference as it is: the bias of B, scaled."""

    values: Tensor
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        return "" if tuple(self.values.shape) == shape else f"its values are {list(self.values.shape)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        return delta.add_(self.values)
