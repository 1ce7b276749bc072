"""The system calls that change files, in one place, so that errors have one face and a test can record every one.

Where a function takes `within`, that is the descriptor of the folder which the path's last name is looked up in: the
rest of the path is only what to call it, and no link in it can be swapped in meanwhile.

Data is written at known offsets with short writes continued. A failed fsync is never tried again: after it the
kernel may have dropped the pages, and a second fsync that succeeds proves nothing.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightlab.errors import IntegrityError, StorageError

Buffer = Any  # bytes, memoryview or a numpy array: whatever os.pwrite takes

# Called as observer(operation, *arguments) after each operation has succeeded; set by tests only.
observer: Callable[..., None] | None = None

# {"rename": how often}: whether this process has given anything its final name, so made or changed what stays.
finished: Counter[str] = Counter()

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_COPY_CHUNK = 2**23
_DEEPEST = 200


def _saw(operation: str, *arguments: Any) -> None:
    if observer is not None:
        observer(operation, *arguments)


def storage_error(path: os.PathLike[str] | str, error: OSError) -> StorageError:
    """An OSError as a `StorageError` that names the path and the cause."""
    if error.errno == errno.EFBIG:
        cause, remedy = "the file size limit is reached", "raise `ulimit -f`"
    elif error.errno in _FULL:
        cause, remedy = _FULL[error.errno], "free some space, or write elsewhere"
    else:
        cause, remedy = error.strerror or str(error), "check the path, its permissions and its file system"
    return StorageError(f"{path}: {cause}", remedy)


@contextmanager
def storage_errors(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turns an OSError into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def _in(path: Path, within: int | None) -> Path | str:
    return path if within is None else path.name


def create(path: Path, *, within: int | None = None) -> int:
    """Opens a new file for reading and writing, with the umask's mode; it must not exist."""
    with storage_errors(path):
        fd = os.open(_in(path, within), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=within)
    _saw("create", path)
    return fd


def open_existing(path: Path, *, within: int | None = None) -> int:
    """Opens a file for writing in place; symbolic links are refused by the system, and no FIFO is waited for."""
    with storage_errors(path):
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(_in(path, within), flags, dir_fd=within)


def write_at(fd: int, data: Buffer, offset: int, path: Path) -> None:
    """Writes all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    position = offset
    with storage_errors(path):
        while view:
            written = os.pwrite(fd, view, position)
            _saw("write", path, position, view[:written])
            view, position = view[written:], position + written


def read_exactly(fd: int, offset: int, out: Any, path: Path) -> None:
    """Fills `out` (a flat uint8 tensor) from a file.

    Raises:
        IntegrityError: the file ends early or cannot be read: it was complete when its header was checked.
    """
    view = out.numpy().data
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise IntegrityError(
                f"{path}: {error.strerror} at byte {offset:,}", "the disk or file is damaged"
            ) from error
        if count == 0:
            raise IntegrityError(f"{path}: ends at byte {offset:,}", "the file was cut off while it was being read")
        view, offset = view[count:], offset + count


def sync_file(fd: int, path: Path, *, data_only: bool = False) -> None:
    with storage_errors(path):
        if data_only:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
    _saw("sync", path)


def sync_early(fd: int, path: Path) -> None:
    """Brings to the disk what is written so far, while more is being written: a hint, and no step of any order."""
    with storage_errors(path):
        os.fdatasync(fd)


def sync_folder(path: Path, *, opened: int | None = None) -> None:
    """Syncs a folder. `opened`: its descriptor, where the caller has one."""
    with storage_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if opened is None else opened
        try:
            os.fsync(fd)
        finally:
            if opened is None:
                os.close(fd)
    _saw("sync_folder", path)


def rename(old: Path, new: Path, *, within: int | None = None, to: int | None = None) -> None:
    """Renames. `within`: the descriptor of the old folder; `to`: of the new one, where it is another."""
    target = within if to is None else to
    with storage_errors(new):
        os.rename(_in(old, within), _in(new, target), src_dir_fd=within, dst_dir_fd=target)
    finished["rename"] += 1
    _saw("rename", old, new)


def unlink(path: Path, *, missing_ok: bool = False, within: int | None = None) -> None:
    with storage_errors(path):
        try:
            os.unlink(_in(path, within), dir_fd=within)
        except FileNotFoundError:
            if missing_ok:
                return
            raise
    _saw("unlink", path)


def make_folder(path: Path, *, within: int | None = None) -> None:
    """Makes one folder; its parent must exist. One that exists is left alone."""
    with storage_errors(path):
        try:
            os.mkdir(_in(path, within), dir_fd=within)
        except FileExistsError:
            return
    _saw("mkdir", path)


def remove_folder(path: Path, *, within: int | None = None) -> None:
    """Removes an empty folder."""
    with storage_errors(path):
        os.rmdir(_in(path, within), dir_fd=within)
    _saw("rmdir", path)


def remove_tree(path: Path, *, within: int | None = None, last: str | None = None) -> None:
    """Removes a folder and all that is in it, through descriptors: links in it go, and what they lead to stays.

    Args:
        last: the name of a file in it that goes after everything else.
    """
    with storage_errors(path):
        _remove_tree(_in(path, within), within, last, 0)
    _saw("rmtree", path)


def _remove_tree(name: Path | str, within: int | None, last: str | None, depth: int) -> None:
    if depth > _DEEPEST:
        raise OSError(errno.ELOOP, "folders lie in one another too deep to be removed")
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    try:
        for inner in sorted(os.listdir(fd), key=lambda n: n == last):
            if stat.S_ISDIR(os.stat(inner, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove_tree(inner, fd, None, depth + 1)
            else:
                os.unlink(inner, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=within)


def hard_link(source: Path, target: Path, *, within: int | None = None) -> bool:
    """Gives `source` a second name; False where the file system or its rules do not allow it.

    Args:
        within: the descriptor of the target's folder.
    """
    try:  # of the file itself, where it is a symbolic link
        os.link(os.path.realpath(source), _in(target, within), dst_dir_fd=within, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.ENOSYS):
            return False
        with storage_errors(target):
            raise
    _saw("link", source, target)
    return True


def copy_range(source_fd: int, source_offset: int, fd: int, offset: int, length: int, path: Path) -> None:
    """Copies bytes inside the kernel (sharing blocks where the file system can), else by read and write."""
    begin, size = offset, length
    with storage_errors(path):
        while length:
            try:
                copied = os.copy_file_range(source_fd, fd, length, source_offset, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                    raise
                copied = 0
            if copied == 0:
                chunk = os.pread(source_fd, min(length, _COPY_CHUNK), source_offset)
                if not chunk:
                    raise OSError(errno.EIO, "the source ended early")
                written = 0
                while written < len(chunk):
                    written += os.pwrite(fd, chunk[written:], offset + written)
                copied = len(chunk)
            source_offset, offset, length = source_offset + copied, offset + copied, length - copied
    _saw("copy", path, begin, size)


def copy_file(source: Path, target: Path, *, within: int | None = None, opened: int | None = None) -> int:
    """Copies a whole file to one that does not exist yet; returns its size.

    Args:
        within: the descriptor of the target's folder.
        opened: that of the source, where the caller has one.
    """
    fd = create(target, within=within)
    try:
        with storage_errors(source):
            begun = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK) if opened is None else opened
        try:
            with storage_errors(source):
                size = os.fstat(begun).st_size
            copy_range(begun, 0, fd, 0, size, target)
        finally:
            if opened is None:
                os.close(begun)
    finally:
        os.close(fd)
    return size


def sync_path(path: Path, *, within: int | None = None) -> None:
    """Syncs a file by name."""
    with storage_errors(path):
        fd = os.open(_in(path, within), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=within)
    try:
        sync_file(fd, path)
    finally:
        os.close(fd)


def require_room(folder: Path, needed: int, largest_file: int) -> None:
    """Checks, before anything is written, that `needed` bytes fit on the disk and one file may be so large.

    Raises:
        StorageError: says how much is needed and how much is there.
    """
    with storage_errors(folder):
        state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise StorageError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free", "free some space, or write elsewhere"
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and largest_file > limit:
        raise StorageError(
            f"{folder}: a file of {largest_file:,} bytes is over this process's limit of {limit:,}", "raise `ulimit -f`"
        )
