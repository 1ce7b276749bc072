"""Digests of tensors and of whole checkpoints, independent of how they lie in files.

A tensor's digest is BLAKE3 over a tag, its dtype, number of dimensions, dimensions (u64, little endian) and its
row-major little-endian bytes. A fingerprint is BLAKE3 over (length-prefixed name, digest), sorted by UTF-8 name.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blake3 import blake3

_TENSOR_TAG = b"weightlab tensor 1\0"
_PART_TAG = b"weightlab part 1\0"
_FINGERPRINT_TAG = b"weightlab fingerprint 1\0"


class Aborted(Exception):
    """Another thread failed while this one waited for its turn."""


def tensor_hasher(dtype: str, shape: tuple[int, ...]) -> Any:
    """A BLAKE3 hasher that has taken everything of a tensor's digest but the bytes."""
    hasher = blake3(_TENSOR_TAG)
    hasher.update(dtype.encode().ljust(16, b"\0"))
    hasher.update(struct.pack(f"<{1 + len(shape)}Q", len(shape), *shape))
    return hasher


def bytes_digest(data: Any) -> str:
    """BLAKE3 of plain bytes, in hex."""
    return str(blake3(data).hexdigest())


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest of a whole checkpoint from the digests of its tensors."""
    hasher = blake3(_FINGERPRINT_TAG)
    for name in sorted(digests, key=str.encode):
        raw = name.encode()
        hasher.update(struct.pack("<Q", len(raw)) + raw + bytes.fromhex(digests[name]))
    return str(hasher.hexdigest())


class Turns:
    """Lets threads do a part of their work in the order of an index, while the rest runs at the same time.

    Tiles are handed out in order, so the one whose turn it is is always being worked on; when its thread fails
    instead, `abort` wakes those who wait.
    """

    def __init__(self) -> None:
        self._next = 0
        self._aborted = False
        self._condition = threading.Condition()

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """Waits until all lower indices are done.

        Raises:
            Aborted: another thread failed.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._next == index or self._aborted)
            if self._aborted:
                raise Aborted
        yield
        with self._condition:
            self._next += 1
            self._condition.notify_all()

    def abort(self) -> None:
        with self._condition:
            self._aborted = True
            self._condition.notify_all()


class PartDigest:
    """The digest of a stored part: BLAKE3 of a tag, the dtype, the bytes as they come, and the shape at the end.

    The shape comes last because a compressed part's length is known only then.
    """

    def __init__(self, dtype: str) -> None:
        self._hasher = blake3(_PART_TAG)
        self._hasher.update(dtype.encode().ljust(16, b"\0"))

    def update(self, data: Any) -> None:
        """Takes the next bytes."""
        self._hasher.update(data)

    def hexdigest(self, shape: tuple[int, ...]) -> str:
        hasher = self._hasher.copy()
        hasher.update(struct.pack(f"<{1 + len(shape)}Q", len(shape), *shape))
        return str(hasher.hexdigest())
