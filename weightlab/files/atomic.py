"""Output that is whole or absent: written beside its place under a name that ends in `.partial`, then renamed.

What a killed run left behind looks like nothing that a model loader reads, and the next run to the same place
removes it: a temporary that is in use is locked, one that is not was abandoned.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from weightlab.errors import NotPatchableError, StorageError
from weightlab.files import disk

SUFFIX = ".partial"


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Checks, before any work, that output may go to `path`.

    Raises:
        NotPatchableError: a file, or a folder that is not empty, is there already.
        StorageError: the folder it should go into does not exist.
    """
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if (path.exists() or path.is_symlink()) and not (overwrite and path.is_file()):
        raise NotPatchableError(f"{path} exists already", "choose another place, or remove it first")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{path.absolute().parent}: no such folder", "make the folder first")


def _temporary(path: Path) -> Path:
    parent = path.absolute().parent
    for left in parent.glob(f".{escape(path.name)}.*{SUFFIX}"):
        try:
            fd = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # it became its output just now
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use by another run, or no locks here: not ours to remove
            continue
        else:
            disk.remove_tree(left) if left.is_dir() else disk.unlink(left)
        finally:
            os.close(fd)
    return parent / f".{path.name}.{secrets.token_hex(4)}{SUFFIX}"


@contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, locked as in use, and removed when the block does not end well."""
    temporary = _temporary(path)
    fd = -1
    try:
        disk.make_folder(temporary)
        fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # where there are no locks, nothing that is left behind is removed either
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield temporary
    except BaseException:
        if temporary.is_dir():
            disk.remove_tree(temporary)
        raise
    finally:
        if fd >= 0:
            os.close(fd)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    Every file in it is synced before the rename. `path` may be an empty folder.
    """
    refuse_existing(path)
    with _locked_folder(path) as temporary:
        yield temporary
        sync_tree(temporary)
        disk.rename(temporary, path.absolute())
    disk.sync_folder(path.absolute().parent)


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path for a temporary file that becomes `path` when the block ends well, and is removed when it does not.

    It lies in a temporary folder, which can be locked before the file is there. The block makes the file, for instance
    with `disk.create`.
    """
    refuse_existing(path, overwrite=overwrite)
    if path.is_dir():
        raise NotPatchableError(f"{path} is a folder", "give the name of a file")
    with _locked_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        disk.sync_path(temporary)
        disk.rename(temporary, path.absolute())
        disk.remove_folder(folder)
    disk.sync_folder(path.absolute().parent)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below `folder`, and itself."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(place) / name
            if file.is_symlink():
                continue
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                disk.sync_file(fd, file)
            finally:
                os.close(fd)
        disk.sync_folder(Path(place))


def replace_file(path: Path, content: bytes) -> None:
    """Writes a small file whole: temporary, sync, rename, sync of the folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    fd = disk.create(temporary)
    try:
        try:
            disk.write_at(fd, content, 0, temporary)
            disk.sync_file(fd, temporary)
        finally:
            os.close(fd)
        disk.rename(temporary, path)
    except BaseException:
        disk.unlink(temporary, missing_ok=True)
        raise
    disk.sync_folder(path.parent)
