"""What is known of one tensor while its difference is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightlab.encodings import Plan
from weightlab.errors import RangeError
from weightlab.extract.pair import TensorPair
from weightlab.extract.rules import Choice
from weightlab.files.digest import tensor_hasher
from weightlab.patches.header import Errors
from weightlab.patches.parts import StoredParts
from weightlab.tensors.arithmetic import is_finite

_ROW = 1024


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a decoded delta is from the true one: largest difference, norm of the difference, norm of the delta."""

    largest: float = 0.0
    error: float = 0.0
    norm: float = 0.0

    def joined(self, other: Distance) -> Distance:
        """Of both ranges together; hypot, because squares of fp64 norms would overflow."""
        return Distance(
            max(self.largest, other.largest), math.hypot(self.error, other.error), math.hypot(self.norm, other.norm)
        )


def distance(delta: Tensor, decoded: Tensor, work: Tensor) -> Distance:
    """The distance of one tile, over the elements whose delta is finite.

    Args:
        delta, decoded: flat, in the compute dtype; they may share memory.
        work: a buffer like them; may not share memory with them.
    """
    if not is_finite(delta):
        finite = torch.isfinite(delta)
        delta, decoded = delta[finite], decoded[finite]
        work = work[: delta.numel()]
        if not delta.numel():
            return Distance()
    torch.sub(decoded, delta, out=work)
    largest = _largest(work)
    return Distance(largest, _norm(work, largest), _norm(delta, _largest(delta)))


def _largest(values: Tensor) -> float:
    low, high = (float(v) for v in torch.aminmax(values))
    return max(-low, high)


def _norm(values: Tensor, largest: float) -> float:
    """The Euclidean norm; fp32 is summed in short rows, and those in fp64.

    Args:
        largest: the largest magnitude in `values`.
    """
    if not largest:
        return 0.0
    if values.dtype == torch.float64:
        return largest * float(torch.linalg.vector_norm(values / largest))
    if not 1e-12 < largest < 1e15:  # squares would leave the range of fp32
        return float(torch.linalg.vector_norm(values, dtype=torch.float64))
    whole = values.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    both = (torch.linalg.vector_norm(part, dtype=torch.float64) for part in (rows, values[whole:]))
    return math.hypot(*map(float, both))


@dataclass(slots=True)
class Job:
    """One tensor.

    Attributes:
        changed: whether the patch has it.
        plan: how it is stored; None before it is planned and for a tensor that did not change.
        parts: what is stored already, of encodings that make their parts before tiles are encoded.
        base_digest, tuned_digest: what they are, once all bytes have been taken; None: not wanted, or nothing there.
        distance: of the tiles so far.
    """

    pair: TensorPair
    choice: Choice
    changed: bool = False
    plan: Plan | None = None
    parts: StoredParts | None = None
    base_digest: str | None = None
    tuned_digest: str | None = None
    distance: Distance = field(default_factory=Distance)
    _hashers: tuple[Any, Any] | None = None

    def take(self, base: Tensor, tuned: Tensor, *, last: bool) -> None:
        """Takes the next bytes of both (flat uint8) for the digests, which are there after the last ones."""
        before, after = self.pair.base_spec, self.pair.tuned_spec
        if self._hashers is None:
            self._hashers = (
                None if before is None else tensor_hasher(before.dtype, before.shape),
                tensor_hasher(after.dtype, after.shape),
            )
        of_base, of_tuned = self._hashers
        of_tuned.update(tuned.numpy().data)
        if of_base is not None:
            of_base.update(base.numpy().data)
        if last:  # a hasher takes two kilobytes, and tensors may be many
            self.tuned_digest = of_tuned.hexdigest()
            self.base_digest = None if of_base is None else of_base.hexdigest()
            self._hashers = None

    def errors(self) -> Errors:
        """What the header says of the distance.

        Raises:
            RangeError: it is beyond fp64, or what is decoded is beyond the compute dtype.
        """
        relative = self.distance.error / self.distance.norm if self.distance.norm else 0.0
        if not (math.isfinite(self.distance.largest) and math.isfinite(relative)):
            raise RangeError(
                "the delta is too large to be stored in this way",
                "store it exact",
                [f"{self.pair.name}: error infinite"],
            )
        return Errors(max_abs=self.distance.largest, relative_l2=relative)
