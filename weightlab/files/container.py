"""The safetensors container: headers read with every rule checked, and written byte for byte the same each time.

Tensor bytes are read and written by offset, never through a map of the whole file. The `safetensors` library,
the format's reference, has the last word on each header that is read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.files.foreign import strict_json
from weightlab.tensors.spec import DTYPES, TensorSpec, is_name

MAX_HEADER = 100_000_000  # the format's own limit
_ALIGN = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its spec and its bytes' absolute place."""

    spec: TensorSpec
    offset: int

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file. `data_start`: where tensor bytes begin; `digest`: BLAKE3 of all bytes before it."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    digest: str


def read_header(path: Path) -> Header:
    """Reads and checks the header of one safetensors file; no tensor bytes are touched.

    Raises:
        MissingInputError: there is no such file.
        MalformedFileError: names the first rule of the format that is broken, and all tensors that break it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MissingInputError(f"{path}: {getattr(error, 'strerror', error)}", "check the path") from error
    try:
        size = os.fstat(fd).st_size
        raw = os.pread(fd, 8, 0)
        if len(raw) < 8:
            raise _malformed(path, f"{size} bytes are too few for a safetensors file")
        length = struct.unpack("<Q", raw)[0]
        if length > MAX_HEADER:
            raise _malformed(path, f"its header claims {length:,} bytes; the format allows {MAX_HEADER:,}")
        if 8 + length > size:
            raise _malformed(path, f"its header claims {length:,} bytes and the file has {size:,}")
        text = os.pread(fd, length, 8)
    finally:
        os.close(fd)
    if not text.startswith(b"{"):
        raise _malformed(path, "its header does not begin with '{'")
    try:
        tree = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not proper JSON: {error}") from error
    hasher = blake3(raw)
    hasher.update(text)
    del text
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "its metadata is not a mapping of strings")
    entries = _entries(path, tree, 8 + length, size)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        if os.fsencode(path).decode(errors="replace") != str(path):
            raise MissingInputError(
                f"{path}: its path is no UTF-8, and the safetensors library opens no such file", "rename it"
            ) from error
        raise _malformed(path, f"the safetensors library refuses it: {error}") from error
    except (OSError, RuntimeError) as error:  # it was there just now, and torch cannot open it
        raise MissingInputError(f"{path}: {error}", "check the path") from error
    return Header(entries, metadata, 8 + length, size, str(hasher.hexdigest()))


def _malformed(path: Path, what: str, offenders: list[str] | None = None) -> MalformedFileError:
    return MalformedFileError(f"{path}: {what}", "the file is damaged or incomplete: get it again", offenders or ())


def _entries(path: Path, tree: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The tensors that a header tells of. They are taken out of `tree`, which for many takes much memory."""
    entries: dict[str, Entry] = {}
    wrong: list[str] = []
    for name in list(tree):
        value = tree.pop(name)
        if not is_name(name):
            wrong.append(f"{name!r}: not a name (it is empty, or has control characters or half characters)")
            continue
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if (
                not rest and type(begin) is int and type(end) is int
            ):
                pass
            case _:
                wrong.append(f"{name}: not a description of a tensor")
                continue
        if dtype not in DTYPES:
            wrong.append(f"{name}: unknown dtype {dtype!r}")
        elif not all(type(d) is int and 0 <= d < 2**63 for d in shape):
            wrong.append(f"{name}: impossible shape {shape}")
        else:
            spec = TensorSpec(name, dtype, tuple(shape))
            if spec.numel * spec.type.bits % 8:
                wrong.append(f"{spec}: its elements do not fill whole bytes")
            elif not 0 <= begin <= end <= size - start:
                wrong.append(f"{spec}: bytes {begin}..{end} are outside the file's {size - start:,} bytes of data")
            elif end - begin != spec.nbytes:
                wrong.append(f"{spec}: {end - begin:,} bytes, and its dtype and shape need {spec.nbytes:,}")
            else:
                entries[name] = Entry(spec, start + begin)
    if wrong:
        raise _malformed(path, f"{len(wrong)} tensors are not described properly", wrong)
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != position:
            what = "overlaps another tensor" if entry.offset < position else "leaves unused bytes before it"
            wrong.append(f"{entry.spec}: {what}")
        position = max(position, entry.offset + entry.nbytes)
    if wrong:
        raise _malformed(path, "its tensors do not lie one after the other", wrong)
    if position != size:
        raise _malformed(path, f"its tensors end at byte {position:,} and the file at {size:,}")
    return entries


def layout(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, int], int]:
    """Places tensors one after the other, larger dtypes first and then by name, so that all are aligned.

    Returns:
        ({name: offset in the data section}, total bytes).
    """
    offsets: dict[str, int] = {}
    position = 0
    for name in sorted(specs, key=lambda n: (-specs[n].type.bits, n.encode())):
        offsets[name] = position
        position += specs[name].nbytes
    return offsets, position


def canonical_json(value: Any) -> str:
    """JSON in one form only: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def described(spec: TensorSpec, offset: int) -> str:
    """What a header says of one tensor, in JSON. `offset`: in the data section."""
    shape = ",".join(map(str, spec.shape))
    return f'{{"data_offsets":[{offset},{offset + spec.nbytes}],"dtype":"{spec.dtype}","shape":[{shape}]}}'


def header_text(
    specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str], before: bytes = b""
) -> bytearray:
    """The JSON of a header, with sorted keys.

    Args:
        offsets: of each tensor in the data section.
        before: bytes that come first; a header of many tensors is not copied to get them.
    """
    text = bytearray(before)
    text += b"{"
    for name in sorted([*specs, *(["__metadata__"] if metadata else [])]):
        if len(text) > len(before) + 1:
            text += b","
        text += canonical_json(name).encode() + b":"
        if name in specs:
            text += described(specs[name], offsets[name]).encode()
            continue
        for index, (key, value) in enumerate(sorted(metadata.items())):
            text += f"{',' if index else '{'}{canonical_json(key)}:".encode()
            text += canonical_json(value).encode()
        text += b"}"
    text += b"}"
    return text


def padded_size(text: int) -> int:
    """The bytes before the data section, for a text of so many: a length, and spaces up to a multiple of 8."""
    return 8 + -(-text // _ALIGN) * _ALIGN


def build_header(
    specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str], *, size: int = 0
) -> bytearray:
    """The bytes before the data section.

    Args:
        offsets: of each tensor in the data section.
        size: pad to this many bytes (a place that was kept free); must be a multiple of 8 and large enough.
    """
    head = header_text(specs, offsets, metadata, bytes(8))
    padded = max(size, padded_size(len(head) - 8))
    if size and padded != size:
        raise AssertionError(f"a header of {len(head) - 8} bytes does not fit the {size} kept for it")
    head[:8] = struct.pack("<Q", padded - 8)
    head += b" " * (padded - len(head))
    return head
