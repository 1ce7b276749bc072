"""Output that is whole or absent: written beside its place under a name that ends in `.partial`, then renamed.

What a killed run left behind looks like nothing that a model loader reads, and the next run to the same place
removes it: a temporary that is in use is locked, one that is not was abandoned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightlab.errors import NotPatchableError, StorageError
from weightlab.files import disk
from weightlab.files.temporary import clear_left, temporary_folder


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Checks, before any work, that output may go to `path`, and clears away what killed runs left of such output.

    Raises:
        NotPatchableError: a file, or a folder that is not empty, is there already.
        StorageError: the folder it should go into does not exist, or the name is none for the file system.
    """
    wrong = "a NUL is in it" if "\0" in os.fspath(path) else ""
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError:
        wrong = "it is no UTF-8, and the safetensors library opens no such file"
    if wrong:
        raise StorageError(f"{path}: no path for output: {wrong}", "choose another name")
    with disk.storage_errors(path):
        clear_left(path)
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            return
        if (path.exists() or path.is_symlink()) and not (overwrite and path.is_file()):
            raise NotPatchableError(f"{path} exists already", "choose another place, or remove it first")
        if not path.absolute().parent.is_dir():
            raise StorageError(f"{path.absolute().parent}: no such folder", "make the folder first")


def _inside(folder: Path, path: Path) -> Path:
    return folder / (path.name if path.name not in ("", "..") else "content")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and is removed when it does not.

    Every file in it is synced before the rename. `path` may be an empty folder.
    """
    refuse_existing(path)
    with temporary_folder(path) as home:
        temporary = _inside(home, path)
        disk.make_folder(temporary)
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
    with temporary_folder(path) as home:
        temporary = _inside(home, path)
        yield temporary
        disk.sync_path(temporary)
        disk.rename(temporary, path.absolute())
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
    """Writes a small file whole, in the place of one that may be there."""
    with atomic_file(path, overwrite=True) as temporary:
        fd = disk.create(temporary)
        try:
            disk.write_at(fd, content, 0, temporary)
        finally:
            os.close(fd)
