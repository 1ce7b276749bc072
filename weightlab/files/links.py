"""Links in a folder that may be a stranger's: followed only where they stay in it, or in the Hub's cache.

A snapshot of the Hub's cache has nothing but links, `../../blobs/DIGEST`; so have the folders that older versions of
huggingface_hub filled with `--local-dir`. Every other link that leads out of a folder gives a file of the user's own a
name in it, and whoever copies the folder's files would pass that file on.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.files.disk import storage_errors
from weightlab.files.foreign import MAX_BYTES, read_opened

_BLOB = re.compile(r".*/models--[^/]+/blobs/[0-9a-f]{40}([0-9a-f]{24})?", re.DOTALL)


def refuse_leading_out(folder: Path, names: Iterable[str]) -> None:
    """Checks files of a folder before they are copied.

    Raises:
        MalformedFileError: lists those that lie elsewhere, and where.
    """
    root = os.path.realpath(folder)
    real = {name: os.path.realpath(folder / name) for name in names}
    wrong = [f"{name}: leads to {place}" for name, place in real.items() if not _belongs(place, root)]
    if wrong:
        raise _leads_out(folder, wrong)


def open_inside(folder: Path, name: str) -> int:
    """A descriptor of a plain file of a folder, for reading. What was opened is looked at, so a swap is noticed.

    Raises:
        MissingInputError: it is gone, or is a FIFO or the like, which is not waited for.
        MalformedFileError: it lies elsewhere.
    """
    path = folder / name
    with storage_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise MissingInputError(f"{path}: no plain file", "check the path")
        real = os.path.realpath(f"/proc/self/fd/{fd}")
        if real.startswith("/proc/"):  # not mounted
            real = os.path.realpath(path)
        if not _belongs(real, os.path.realpath(folder)):
            raise _leads_out(folder, [f"{name}: leads to {real}"])
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_inside(folder: Path, name: str, *, limit: int = MAX_BYTES) -> bytes:
    """The content of a small file that is opened by `open_inside`."""
    fd = open_inside(folder, name)
    try:
        return read_opened(fd, folder / name, limit=limit)
    finally:
        os.close(fd)


def _belongs(real: str, root: str) -> bool:
    return real.startswith(root.rstrip("/") + "/") or _BLOB.fullmatch(real) is not None


def _leads_out(folder: Path, wrong: list[str]) -> MalformedFileError:
    return MalformedFileError(
        f"{folder}: links lead out of the folder, and are not followed",
        "if you made these links, put the files themselves in their place (cp -rL FOLDER COPY makes such a copy); "
        "if the folder is someone else's, remove them",
        wrong,
    )
