"""`exact`: the tuned tensor bit for bit, as a compressed difference to the base's bit patterns, in blocks of `TILE`.

`data` holds the frames of all blocks, one after the other, and `frames` their lengths: a row a block, a column for each
of `PLANES`. A frame of no bytes stands for zeros, one as long as its plane is the plane itself, a shorter one is a zstd
frame of it; "rules" is always itself. A block without rules is unchanged, or if it has "symbols", these are the tuned
bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from weightlab.encodings._base import (
    Buffers,
    DeltaReader,
    Expected,
    Parts,
    Plan,
    Spool,
    Tile,
    no_arguments,
    part_specs,
)
from weightlab.encodings._exact_codec import PLANES, join, split
from weightlab.encodings._exact_words import Array
from weightlab.errors import IntegrityError
from weightlab.tensors.arithmetic import bits, raw_bytes
from weightlab.tensors.spec import BY_TORCH, TensorSpec
from weightlab.tensors.tiles import TILE, tile_count

_REMEDY = "get the patch again"
_PIECE = 2048  # bytes that are worth a Huffman table of their own
_PLAIN = 1024  # bytes of a block that are not worth splitting: the header says as much about such a tensor


class _Contexts(threading.local):
    """The zstd contexts of one thread."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, window_log=20, write_content_size=True, write_checksum=False, write_dict_id=False, threads=0
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def encode_block(base: Array, tuned: Array, dtype: str) -> list[bytes]:
    """The frames of one block of 1 to `TILE` elements, together at most as long as `tuned`.

    Args:
        base, tuned: the bytes of the same elements, uint8 and contiguous, little-endian.
    """
    if np.array_equal(base[:_PIECE], tuned[:_PIECE]) and np.array_equal(base, tuned):
        return [b""] * len(PLANES)
    if tuned.nbytes > _PLAIN:
        rules, *planes = split(base, tuned, dtype)
        frames = [b"".join(piece.tobytes() for piece in rules), *map(_compress, planes)]
        if sum(map(len, frames)) < tuned.nbytes:
            return frames
    return [tuned.tobytes() if plane == "symbols" else b"" for plane in PLANES]


def decode_block(base: Array, frames: Sequence[Array], dtype: str) -> Array:
    """The tuned bit patterns of one block, flat, as unsigned integers.

    Args:
        base: the bytes of the base's elements, uint8 and contiguous.

    Raises:
        ValueError: the frames make no sense. A frame is decompressed only if it declares the size that it must have.
    """
    named = dict(zip(PLANES, frames, strict=True))
    if len(named["rules"]):
        return join(base, named["rules"], lambda plane, size: _taker(_decompress(named[plane], size)), dtype)
    size = sum(map(len, frames))
    if size and (size != base.nbytes or len(named["symbols"]) != size):
        raise ValueError("a block without rules has a wrong length")
    return (named["symbols"] if size else base).copy()


def _compress(pieces: Sequence[Array]) -> bytes:
    """One zstd frame with a new block (and table) where a piece ends; raw if that is not longer, empty if all zero."""
    size = sum(map(len, pieces))
    if not any(piece.any() for piece in pieces):
        return b""
    if size < _PIECE:
        whole = b"".join(piece.tobytes() for piece in pieces)
        frame = _contexts.compressor.compress(whole)
        return frame if len(frame) < size else whole
    stream = _contexts.compressor.compressobj(size=size)
    blocks, pending = list[bytes](), 0
    for piece in pieces:
        if pending >= _PIECE:
            blocks.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            pending = 0
        blocks.append(stream.compress(piece.data))
        pending += len(piece)
    blocks.append(stream.flush())
    frame = b"".join(blocks)
    return frame if len(frame) < size else b"".join(piece.tobytes() for piece in pieces)


def _taker(plane: Array) -> Callable[[int], Array]:
    """Gives the bytes of a plane, in order, so many at a time."""
    place = 0

    def take(size: int) -> Array:
        nonlocal place
        place += size
        return plane[place - size : place]

    return take


def _decompress(frame: Array, size: int) -> Array:
    if len(frame) in (0, size):
        return frame if len(frame) else np.zeros(size, dtype=np.uint8)
    if len(frame) > size:
        raise ValueError("a frame is longer than what it stands for")
    try:
        # Before anything else: a hostile frame may claim any size, or none.
        if zstandard.frame_content_size(frame.data) != size:
            raise ValueError("a frame declares another size than it must have")
        raw = _contexts.decompressor.decompress(frame.data, size, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a frame cannot be decompressed ({error})") from None
    if len(raw) != size:
        raise ValueError("a frame holds another size than it declares")
    return np.frombuffer(raw, dtype=np.uint8)


class _Exact:
    lossless = True
    example = "exact (bit for bit; the default)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        return no_arguments("exact", arguments)

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        return True

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        return {"data": Expected(("U8",), (None,)), "frames": Expected(("U32",), _table_shape(spec))}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        spec = delta.spec
        # A frame is never longer than the bytes that it stands for.
        return Plan(part_specs(frames=("U32", _table_shape(spec))), {}, growing=("data", spec.stored.nbytes))

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        frames = encode_block(raw_bytes(tile.base), raw_bytes(tile.tuned), spec.stored.dtype)
        table = np.asarray([len(frame) for frame in frames], dtype=np.uint32)
        data = np.frombuffer(bytearray().join(frames), dtype=np.uint8)
        return {"data": torch.from_numpy(data), "frames": torch.from_numpy(table)}, None

    def restore(self, parts: Parts, start: int, stop: int, base: Tensor, buffers: Buffers) -> Tensor:
        spec = parts.spec.stored
        if start % TILE or stop != min(start + TILE, spec.numel):
            raise AssertionError(f"{spec.name}: [{start}, {stop}) is not a block")
        if start == stop:
            return bits(base)
        ends = parts.cached("frame ends", lambda: _frame_ends(parts))
        first = start // TILE * len(PLANES)
        bounds = ends[first : first + len(PLANES) + 1]
        data = parts.read("data", int(bounds[0]), int(bounds[-1]), buffers).numpy()
        try:
            frames = np.split(data, bounds[1:-1] - bounds[0])
            tuned = torch.from_numpy(decode_block(raw_bytes(base), frames, spec.dtype))
            return bits(tuned.view(torch.uint8).view(base.dtype))
        except ValueError as error:
            raise IntegrityError(f"{spec.name}: {error}", _REMEDY) from None

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        dtype = parts.spec.stored.type.torch
        assert dtype is not None
        tuned = self.restore(parts, start, stop, as_dtype(base, dtype), buffers).view(dtype)
        out.copy_(tuned)
        out.sub_(base.to(out.dtype))


def as_dtype(base: Tensor, dtype: torch.dtype) -> Tensor:
    """The base in the dtype of the tuned tensor, where they differ, as encoder and decoder both take it.

    What that dtype cannot hold counts as zero: processors and versions disagree on what becomes of it.
    """
    if base.dtype == dtype:
        return base
    converted = base.to(dtype)
    wide = base if base.element_size() > 1 else base.float()
    bits(converted).masked_fill_(~(wide.abs() < BY_TORCH[dtype].limit), 0)
    return converted


def _table_shape(spec: TensorSpec) -> tuple[int, int]:
    return tile_count(spec.stored.numel), len(PLANES)


def _frame_ends(parts: Parts) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each frame begins, and the end of the last: int64 [blocks * planes + 1].

    Raises:
        IntegrityError: the frames do not add up to the data.
    """
    table = parts.whole("frames").numpy().reshape(-1)
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(table, dtype=np.int64)])
    if int(ends[-1]) != parts.numel("data"):
        raise IntegrityError(f"{parts.spec.name}: its frames and its data disagree", _REMEDY)
    return ends


ENCODING = _Exact()
