"""What an encoding must offer, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from weightlab.errors import NonFiniteError, RangeError, UsageError
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import rectangles

Cached = TypeVar("Cached")


class Buffers(Protocol):
    """Reused memory of the calling thread."""

    def buffer(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor whose content is left over from earlier use."""


@dataclass(slots=True)
class Tile:
    """One range of a tensor pair, flat.

    Attributes:
        start, stop: element range.
        base, tuned: storage dtype; equal dtypes. Elements that the base lacks are zero.
        delta: tuned − base in the compute dtype (fp32, or fp64 for fp64 tensors).
    """

    start: int
    stop: int
    base: Tensor
    tuned: Tensor
    delta: Tensor


class DeltaReader(Protocol):
    """Reads the delta of one tensor pair as often as an encoder needs."""

    spec: TensorSpec
    """Name, dtype and shape of the tensor that the patch will be put on."""
    compute: torch.dtype
    """The dtype of the delta: fp32, or fp64 for fp64 tensors."""

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, delta) in order; delta is flat, valid until the next step."""

    def matrix(self) -> AbstractContextManager[Tensor]:
        """The whole delta as a matrix [rows, columns], for encoders that factorise.

        For the length of a block, in which there is room for several copies of it.
        """


class Spool(Protocol):
    """Takes the bytes of parts whose size is known only once they are computed."""

    def append(self, part: str, values: Tensor) -> None:
        """Adds `values` to the end of a part."""


@dataclass(slots=True)
class Plan:
    """What `prepare` decided for one tensor.

    Attributes:
        parts: every part of fixed size, with dtype and shape.
        parameters: JSON values that decoding needs, kept in the header.
        state: whatever `encode` needs.
        small: parts that are finished already (code books, row scales).
        spooled: all parts were given to the spool; `encode` has nothing to add.
        growing: a part of bytes whose size is known at the end: (name, most bytes it can take).
    """

    parts: dict[str, TensorSpec]
    parameters: dict[str, Any]
    state: Any = None
    small: dict[str, Tensor] = field(default_factory=dict)
    spooled: bool = False
    growing: tuple[str, int] | None = None


class Parts(Protocol):
    """The stored parts of one tensor, for decoding."""

    spec: TensorSpec
    """Name, dtype and shape of the patched tensor."""
    parameters: Mapping[str, Any]

    def read(self, part: str, start: int, stop: int, buffers: Buffers) -> Tensor:
        """Elements [start, stop) of a part, flat; valid until the next read of that part by this thread."""

    def numel(self, part: str) -> int:
        """How many elements a part has."""

    def cached(self, key: str, make: Callable[[], Cached]) -> Cached:
        """`make()`, computed once for this tensor and kept."""

    def whole(self, part: str) -> Tensor:
        """A small part as a whole, in its shape; kept."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stored part must be: one of some dtypes, and a shape in which None is any length."""

    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...]

    def problem(self, found: TensorSpec) -> str:
        """Why `found` is not that; empty when it is."""
        fits = len(found.shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, found.shape, strict=True)
        )
        if found.dtype in self.dtypes and fits:
            return ""
        shape = ["any" if d is None else d for d in self.shape]
        return f"is {found.dtype}{list(found.shape)}, should be {' or '.join(self.dtypes)}{shape}"


class Encoding(Protocol):
    """A plug-in: one way to store a tensor's delta."""

    lossless: bool
    """Whether decoding gives the tuned tensor bit for bit (and so needs the base)."""
    example: str
    """How it is written on the command line."""

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Parameters from the words after the name: `low_rank:16` gives ["16"].

        Raises:
            UsageError: they make no sense; says what is taken.
        """

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        """Whether storing this tensor so makes sense; if not, it is stored dense and the header says so."""

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        """The parts that a stored tensor must have, from its spec and the parameters in the header.

        Raises:
            ValueError, KeyError or TypeError: the parameters make no sense.
        """

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan | None:
        """Makes whatever passes over the delta are needed before tiles can be encoded.

        Returns:
            None where it turns out that the tensor is better stored dense, as if `accepts` had said no.

        Raises:
            NonFiniteError, RangeError: the encoding cannot hold this delta; names the tensor.
        """

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        """Encodes one tile: (values to append to each part, the delta as it will be decoded).

        None for the second: lossless, or spooled, where the caller decodes what is in the spool.
        """

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        """Writes the delta of [start, stop) to `out` (flat, fp32 or fp64). `start` is a multiple of TILE.

        Args:
            base: the same range of the tensor it goes on, in its storage dtype.

        Raises:
            IntegrityError: the stored bytes make no sense.
        """


class LosslessEncoding(Encoding, Protocol):
    """An encoding whose result is the tuned tensor bit for bit, given the very base."""

    def restore(self, parts: Parts, start: int, stop: int, base: Tensor, buffers: Buffers) -> Tensor:
        """The tuned bits of [start, stop), flat, as integers of the dtype's width.

        Args:
            base: the same range of the base, in the tuned tensor's dtype; what the base lacks is zero.
        """


def part_specs(**parts: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    """Specs of parts from (dtype, shape) pairs."""
    return {part: TensorSpec(part, dtype, shape) for part, (dtype, shape) in parts.items()}


def no_arguments(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """For encodings without parameters."""
    if arguments:
        raise UsageError(f"{name} takes no parameter, got {':'.join(arguments)!r}", f"write {name}")
    return {}


def row_blocks(values: Tensor, start: int, stop: int, columns: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cuts the elements [start, stop) of a matrix, flat, by rows: (first row, row after the last, the matrix there)."""
    done = 0
    for first, last, left, right in rectangles(start, stop, columns):
        size = (last - first) * (right - left)
        yield first, last, values[done : done + size].reshape(last - first, right - left)
        done += size


def require_finite(values: Tensor, name: str, encoding: str) -> None:
    """Checks statistics of a delta (ranges, sums), for encodings that cannot stand for NaN and infinity.

    Raises:
        NonFiniteError: names the tensor.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"{encoding} cannot hold NaN or infinity",
            "store it dense or exact, or exclude it",
            [f"{name} ({encoding})"],
        )


def as_scales(values: Tensor, name: str, encoding: str) -> Tensor:
    """Statistics of a delta as the fp32 scales that its codes are multiplied by.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
        RangeError: it is beyond fp32.
    """
    require_finite(values, name, encoding)
    scales = values.to(torch.float32)
    if not bool(torch.isfinite(scales).all()):
        largest = float(values.abs().max())
        raise RangeError(
            "the delta is too large for its encoding",
            "store it dense:fp64 or exact, or exclude it",
            [f"{name}: reaches {largest:.6g}, and {encoding} holds fp32"],
        )
    return scales


def per_row(values: Tensor, start: int, stop: int, columns: int) -> Tensor:
    """Spreads one value a row over the elements [start, stop) of a matrix with that many columns, flat."""
    if values.numel() == 1:
        return values.reshape(1).expand(stop - start)
    flat = values.reshape(-1)
    pieces = [
        flat[first:last, None].expand(last - first, right - left).reshape(-1)
        for first, last, left, right in rectangles(start, stop, columns)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
