"""What an adapter does to one tensor: adds a product of two factors, or puts values in its place.

Scaled factors give Δ = scaling · B·A (LoRA: arXiv 2106.09685). `modules_to_save`, biases, trained tokens and saved
embeddings are values, not differences: their Δ is value − base, so it needs the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

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
        magnitude: [m], of rows (of a convolution: of what goes to one output); with `transposed`, of the columns.
    """

    product: Product
    magnitude: Tensor
    transposed: bool
    needs_base: bool = True

    def problem(self, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or (self.transposed and len(shape) != 2):
            return "DoRA on what is neither a matrix nor a convolution"
        rows = shape[1] if self.transposed else shape[0]
        return self.product.problem(shape) or ("" if self.magnitude.numel() == rows else "its magnitudes do not fit")

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        assert base is not None
        along = (0,) if self.transposed else tuple(range(1, base.ndim))
        moved = self.product.onto(base + delta, None)
        lengths = moved.square().sum(dim=along, keepdim=True).sqrt_()
        return moved.mul_(self.magnitude.reshape(lengths.shape) / lengths).sub_(base)


@dataclass(frozen=True, slots=True)
class Stacked:
    """LoRA on a parameter itself: a matrix [out, in], or the stacked matrices of experts, [experts, ·, ·].

    Attributes:
        down: A, [rank · experts, in].
        up: B, [out, rank · experts].
        scaling: from a rank.
        in_first: whether an expert's matrix is [in, out]; None: its shape tells.
        by_expert: whether B has an expert's columns side by side, as Unsloth packs it, and not a rank's, as peft does.
    """

    down: Tensor
    up: Tensor
    scaling: Callable[[int], float]
    in_first: bool | None = None
    by_expert: bool = False
    needs_base: bool = False

    def problem(self, shape: tuple[int, ...]) -> str:
        sizes = (self.up.shape[0], self.down.shape[1])
        if len(shape) == 2:
            return "" if shape == sizes else f"its factors make {list(sizes)}"
        if len(shape) != 3 or not shape[0] or self.down.shape[0] % shape[0]:
            return f"its factors are for stacked matrices of {list(sizes)}"
        if self.in_first is None and sizes[0] == sizes[1]:
            return "its matrices are square, so the network must say which way they lie"
        fits = {None: (sizes, sizes[::-1]), False: (sizes,), True: (sizes[::-1],)}[self.in_first]
        return "" if shape[1:] in fits else f"its factors make {list(sizes)}"

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        experts = delta.shape[0] if delta.ndim == 3 else 1
        down = self.down.reshape(experts, -1, self.down.shape[1])
        ranks = down.shape[1]
        packed = (experts, ranks) if self.by_expert else (ranks, experts)
        up = self.up.reshape(self.up.shape[0], *packed)
        up = (up.permute(1, 0, 2) if self.by_expert else up.permute(2, 0, 1)) * self.scaling(ranks)
        if delta.ndim == 2:
            return delta.add_(up[0] @ down[0])
        in_first = self.in_first if self.in_first is not None else delta.shape[1] != self.up.shape[0]
        for expert in range(experts):  # one product at a time, and no tensor as large as all
            product = up[expert] @ down[expert]
            delta[expert] += product.T if in_first else product
        return delta


@dataclass(frozen=True, slots=True)
class Values:
    """New values of the whole tensor, perhaps with more rows.

    Attributes:
        dtype: what they are stored as in the adapter, by its name in the safetensors format.
    """

    values: Tensor
    needs_base: bool = True
    dtype: str = "F32"

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
        if shape and max(self.places, default=0) >= shape[0]:
            return f"token {max(self.places)} was trained, and the adapter was saved without the embedding's new rows"
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


@dataclass(frozen=True, slots=True)
class Folded:
    """What a layer of peft's makes of one of a module's tensors when it is merged; it needs the module's others too.

    Attributes:
        fold: the same object for all tensors of the module.
        own: "weight" or "bias".
    """

    fold: Fold
    own: str
    needs_base: bool = True

    @property
    def optional(self) -> bool:
        """Whether the module may lack that tensor."""
        return self.own == "bias" and "weight" in self.fold.changes

    def problem(self, shape: tuple[int, ...]) -> str:
        return ""  # peft tells when it makes the layer, before anything is written

    def onto(self, delta: Tensor, base: Tensor | None) -> Tensor:
        raise NotImplementedError("a layer of peft's needs all tensors of its module: see `Fold.merged`")


class Fold(Protocol):
    """How peft merges one module.

    Attributes:
        module: the network's name of it.
        changes: which of its tensors become others.
    """

    @property
    def module(self) -> str: ...

    @property
    def changes(self) -> tuple[str, ...]: ...

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"weight" or "bias": what it becomes}, from what they are, in fp32."""


def same_change(first: Change, second: Change) -> bool:
    """Whether two changes, of two ends of a tie, do the same."""
    if isinstance(first, Product) and isinstance(second, Product):
        return _same_product(first, second)
    if type(first) is not type(second) or not is_dataclass(first) or isinstance(first, type):
        return False
    return all(_equal(getattr(first, part.name), getattr(second, part.name)) for part in fields(first))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Product):
        return isinstance(second, Product) and _same_product(first, second)
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return bool(first == second)


def _same_product(first: Product, second: Product) -> bool:
    """A LoRA of an embedding and one of a head that is tied to it have the same factors in another order."""
    if (first.left.shape[0], first.right.shape[1]) != (second.left.shape[0], second.right.shape[1]):
        return False
    rows = 2**12
    for start in range(0, first.left.shape[0], rows):
        one, other = (product.left[start : start + rows] @ product.right for product in (first, second))
        if not torch.allclose(one, other, rtol=0.0, atol=1e-6 * float(one.abs().max())):
            return False
    return True
