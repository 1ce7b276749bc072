"""The exclusive parts on a module's tensors: factors where there are some, else whole differences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MisfitError, NamesMismatchError
from weightlab.networks.names import file_views
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource, PatchedSource
from weightlab.sources import Source
from weightlab.sources.virtual.memory import MemorySource


@dataclass(slots=True)
class Parts:
    """What experts add to one tensor of a module.

    Attributes:
        left, right, owner: factors of all experts beside each other, left [m, R] and right [R, n] of the tensor as a
            matrix [m, n] with one row for each of its first dimension; owner [R] says whose column that is. None: no
            expert has factors here.
        dense: {expert's number: the difference, in the tensor's shape}.
        classes: of a classifier that not all experts have in one size, {expert's number: its rows}.
        stack: of vectors, the values of `dense` beside each other [experts that have one, n].
    """

    left: Tensor | None = None
    right: Tensor | None = None
    owner: Tensor | None = None
    dense: dict[int, Tensor] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    stack: Tensor | None = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Changes where all of it is, or in which dtype: `fn` is what `nn.Module.to` and its like do to a tensor."""
        if self.left is not None and self.right is not None and self.owner is not None:
            self.left, self.right, self.owner = fn(self.left), fn(self.right), fn(self.owner)
        self.dense = {expert: fn(delta) for expert, delta in self.dense.items()}
        self.stack = None if self.stack is None else fn(self.stack)

    def vectors(self, weights: Tensor) -> Tensor:
        """The mixtures [samples, n] of vectors, for weights [samples, T]; in the dtype of the vectors."""
        assert self.stack is not None
        if len(self.dense) < weights.shape[1]:
            weights = weights[:, list(self.dense)]
        with _exact(weights.device):
            return weights.to(self.stack.dtype) @ self.stack

    def mixed(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """Σ weightₜ·differenceₜ, for weights [T]; in fp32, or fp64 if either is."""
        held = [self.left, *self.dense.values()]
        dtype = next(torch.promote_types(weights.dtype, tensor.dtype) for tensor in held if tensor is not None)
        total = torch.zeros(tuple(shape), dtype=dtype, device=weights.device)
        if self.left is not None and self.right is not None and self.owner is not None:
            with _exact(weights.device):
                product = (self.left * weights[self.owner]).to(dtype) @ self.right.to(dtype)
            total += product.view(tuple(shape))
        for expert, delta in self.dense.items():
            total += weights[expert] * delta
        return total


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Products of all the bits that numbers have, also under autocast: weights are no activations."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@dataclass(frozen=True, slots=True)
class _Piece:
    """One expert's part of one tensor of the files, and where it lies in the module's tensor."""

    expert: int
    view: Tensor
    patch: Patch
    name: str


def parts_on(module: nn.Module, patches: Sequence[Patch], heads: Collection[str]) -> dict[str, Parts]:
    """{the module's name of a tensor: what experts add to it}.

    Args:
        patches: one for each expert, on the module as it is.
        heads: tensors that experts bring along; they are zero in the module.

    Raises:
        NamesMismatchError: lists tensors that the module does not have.
        MisfitError: lists those that it has in another shape.
    """
    views = file_views(module)
    state = dict(module.state_dict(keep_vars=True))
    pieces: dict[str, list[_Piece]] = {}
    missing: dict[str, None] = {}
    wrong: list[str] = []
    for expert, patch in enumerate(patches):
        for name, record in patch.records.items():
            if name not in views:
                missing[name] = None
                continue
            owner, view = views[name]
            if not _fits(record.shape, view.shape, head=name in heads):
                wrong.append(f"{name}: {list(record.shape)} in {patch.label}, {list(view.shape)} in the module")
            pieces.setdefault(owner, []).append(_Piece(expert, view, patch, name))
    if missing:
        raise NamesMismatchError(
            f"{type(module).__name__} lacks {len(missing)} tensors of the experts",
            "give the class of the experts",
            list(missing),
        )
    if wrong:
        raise MisfitError("experts' parts have other shapes than the module", "give the class of the experts", wrong)
    return {owner: _joined(state[owner], mine, heads) for owner, mine in pieces.items()}


def _fits(shape: Sequence[int], room: Sequence[int], *, head: bool) -> bool:
    fewer = head and len(shape) == len(room) > 0 and list(shape[1:]) == list(room[1:]) and shape[0] < room[0]
    return list(shape) == list(room) or fewer


def _joined(tensor: Tensor, pieces: Sequence[_Piece], heads: Collection[str]) -> Parts:
    found = Parts()
    lefts, rights, owners = [], [], []
    for piece in pieces:
        factors = _factors(tensor, piece)
        if factors is not None:
            lefts.append(factors[0])
            rights.append(factors[1])
            owners += [piece.expert] * len(factors[1])
            continue
        whole = found.dense.setdefault(piece.expert, _zeros_like(tensor))
        inside = piece.view.storage_offset() - tensor.storage_offset()
        part = whole.as_strided(piece.view.shape, piece.view.stride(), inside)
        if piece.name in heads:  # of a classifier with fewer classes than another expert's, the first rows
            values = _values(piece)
            (part[: len(values)] if values.ndim else part).copy_(values)
            found.classes[piece.expert] = len(values) if values.ndim else 1
        else:
            part.copy_(_delta(piece))
    if found.dense and tensor.ndim == 1:
        found.stack = torch.stack(list(found.dense.values()))
    if len(set(found.classes.values())) < 2:
        found.classes = {}
    if lefts:
        found.left, found.right = torch.cat(lefts, 1).to(tensor), torch.cat(rights, 0).to(tensor)
        found.owner = torch.tensor(owners, device=tensor.device)
    return found


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros that lie in memory as it does (channels last, say): a view of one is at the same places of the other."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.zero_()


def _factors(tensor: Tensor, piece: _Piece) -> tuple[Tensor, Tensor] | None:
    """The factors, where the tensor of the files is the module's as a whole, as it is or transposed."""
    record = piece.patch.records[piece.name]
    if record.encoding != "low_rank":
        return None
    parts = piece.patch.parts(piece.name)
    left, right = parts.whole("left").float(), parts.whole("right").float()
    if piece.view.shape == tensor.shape and piece.view.stride() == tensor.stride():
        return left, right
    if tensor.ndim == 2 and piece.view.shape == tensor.T.shape and piece.view.stride() == tensor.T.stride():
        return right.T, left.T
    return None


def _delta(piece: _Piece) -> Tensor:
    """The difference as it is stored."""
    source = DeltaSource([piece.patch.at(1.0)], None, [piece.name])
    return _read(source, piece.name)


def _values(piece: _Piece) -> Tensor:
    """What an expert brings along."""
    nothing = MemorySource({})
    source = PatchedSource(nothing, fit(nothing, [StackEntry(piece.patch, 1.0, include=(escape(piece.name),))]))
    return _read(source, piece.name)


def _read(source: Source, name: str) -> Tensor:
    made = source.specs[name].empty()
    source.read(name, 0, made.reshape(-1).view(torch.uint8))
    return made
