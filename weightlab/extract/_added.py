"""A tensor that a patch adds: it has no difference, so its very bits are stored, as `exact` does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlab.encodings import ENCODINGS, Plan, Tile
from weightlab.files.digest import tensor_hasher
from weightlab.patches.layout import StoredTensor
from weightlab.tensors.arithmetic import raw_bytes
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import tiles

ENCODING = "exact"


def stored_bits(spec: TensorSpec) -> StoredTensor:
    """The parts that a tensor of this dtype and shape has."""
    plan = _plan(spec)
    return StoredTensor(plan.parts, plan.growing)


def bits_of(spec: TensorSpec, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(part, values) in the order in which they are written; `values` are put into the tensor's own dtype."""
    plan, encoding = _plan(spec), ENCODINGS.get(ENCODING)
    assert spec.type.torch is not None
    flat = values.reshape(-1)
    for start, stop in tiles(spec.numel):
        tuned = flat[start:stop].to(spec.type.torch)
        tile = Tile(start, stop, torch.zeros_like(tuned), tuned, flat[start:stop])
        parts, _ = encoding.encode(plan, spec, tile)
        yield from parts.items()


def digest_of(spec: TensorSpec, values: Tensor) -> str:
    """The digest of the tensor that the values become."""
    hasher = tensor_hasher(spec.dtype, spec.shape)
    hasher.update(raw_bytes(values.to(spec.type.torch)))
    return str(hasher.hexdigest())


def _plan(spec: TensorSpec) -> Plan:
    plan = ENCODINGS.get(ENCODING).prepare(_Whole(spec), {}, _NoSpool())
    assert plan is not None
    return plan


@dataclass(slots=True)
class _Whole:
    """What `prepare` asks of a tensor: `exact` needs no more than its spec."""

    spec: TensorSpec
    compute: torch.dtype = torch.float32

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        raise AssertionError("exact reads nothing beforehand")

    def matrix(self) -> AbstractContextManager[Tensor]:
        raise AssertionError("exact factorises nothing")


class _NoSpool:
    def append(self, part: str, values: Tensor) -> None:
        raise AssertionError("exact spools nothing")
