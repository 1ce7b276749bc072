"""Temporary folders beside an output: which are ours, and clearing away what killed runs left.

A name proves nothing: other programs call their files `.NAME.something.partial` too. A folder is taken for ours when

- its name is that which is made here for the very same output,
- it is a plain folder of the same user's, and no other run has it locked, and
- it holds a file `weightlab-NUMBER`, where NUMBER is the folder's own inode, which the system gave it when it was
  made: neither a copy of it nor one out of an archive has the same. Or the folder is empty, as a run that is killed
  just after making it leaves it: then there is nothing in it to lose.

All else of such a name stays: files, links, FIFOs, folders that were filled by others. It is opened without waiting.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightlab.files import disk
from weightlab.files.digest import bytes_digest

SUFFIX = ".partial"
MAX_NAME = 255
"""Bytes that a name can have on the usual file systems."""

_DIGEST = 32


def fitting(name: str, *, before: str = "", after: str = "") -> str:
    """A name made of another, which may be as long as names can be: then its end gives way to a digest of the whole.

    A name that has room is only put between `before` and `after`.
    """
    whole = before + name + after
    if len(os.fsencode(whole)) <= MAX_NAME:
        return whole
    room = MAX_NAME - len(os.fsencode(before + after)) - _DIGEST - 1
    raw = os.fsencode(name)  # which may be no UTF-8
    return f"{before}{raw[:room].decode(errors='ignore')}~{bytes_digest(raw)[:_DIGEST]}{after}"


def _proof(fd: int) -> str:
    return f"weightlab-{os.fstat(fd).st_ino}"


def _open(path: Path, within: int) -> int:
    return os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)


def _is_ours(fd: int) -> bool:
    """Whether an open folder was made here and is in use by no one. If so, its lock is held afterwards."""
    if os.fstat(fd).st_uid != os.geteuid() or not _proven(fd):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # in use by another run, or no locks here: not ours to remove
        return False
    return _proven(fd)  # still, now that no one else has it


def _proven(fd: int) -> bool:
    found = os.listdir(fd)
    return not found or _proof(fd) in found


def clear_left(path: Path) -> None:
    """Removes the temporary folders that killed runs left of an output to `path`."""
    end = f".{_token()}{SUFFIX}"
    head = fitting(path.name, before=".", after=end).removesuffix(end)
    form = re.compile(re.escape(head) + r"\.[0-9a-f]{8}" + re.escape(SUFFIX))
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        return
    with disk.storage_errors(parent):
        within = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(within):
            if not form.fullmatch(name):
                continue
            try:
                fd = _open(parent / name, within)
            except OSError:  # a file, a link, a FIFO, or it became its output just now
                continue
            try:
                if _is_ours(fd):
                    disk.remove_tree(parent / name, within=within, last=_proof(fd))
            finally:
                os.close(fd)
    finally:
        os.close(within)


def _token() -> str:
    return secrets.token_hex(4)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked as in use and marked as ours, and removed at the end, well or not.

    What the block makes in it, it renames to `path` when all is well: that is on the same file system.
    """
    fd = -1
    temporary = _beside(path)
    try:
        disk.make_folder(temporary)
        fd = _locked(temporary)
        while not os.fstat(fd).st_nlink:  # another run took it for one that was left, just then
            os.close(fd)
            fd, temporary = -1, _beside(path)
            disk.make_folder(temporary)
            fd = _locked(temporary)
        os.close(disk.create(temporary / _proof(fd), within=fd))
        yield temporary
    finally:
        if temporary.is_dir():
            disk.remove_tree(temporary, last=_proof(fd) if fd >= 0 else None)
        if fd >= 0:
            os.close(fd)


def _beside(path: Path) -> Path:
    return path.absolute().parent / fitting(path.name, before=".", after=f".{_token()}{SUFFIX}")


def _locked(folder: Path) -> int:
    with disk.storage_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with suppress(OSError):  # where there are no locks, nothing that is left behind is removed either
        fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
