"""A folder that is held open: what is in it is reached through its descriptor, and never through a link.

A path is followed each time it is used, and another process can swap a folder on it for a link between two uses. Here
only the path of the first folder is followed, once; what lies below is opened name by name, and a link on the way is
an error.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from weightlab.errors import IntegrityError
from weightlab.files import disk
from weightlab.files.temporary import SUFFIX, fitting

Kind: TypeAlias = Literal["file", "folder", "link", "other"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


def not_followed(path: Path, what: str = "is a symbolic link, and none is followed here") -> IntegrityError:
    """The error for something that is not the plain file or folder that it has to be."""
    return IntegrityError(f"{path} {what}", "remove it: weightlab makes plain files and folders only")


class Folder:
    """An open folder. Names are of things right in it; `path` is what to call it in messages.

    Methods that change something are those of `disk` with this folder's descriptor.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    def names(self) -> list[str]:
        with disk.storage_errors(self.path):
            return sorted(os.listdir(self.fd))

    def look(self, name: str) -> os.stat_result | None:
        """What stands under a name, links not followed; None: nothing."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise disk.storage_error(self.path / name, error) from error

    def kind(self, name: str) -> Kind | None:
        found = self.look(name)
        return None if found is None else _KINDS.get(stat.S_IFMT(found.st_mode), "other")

    @contextmanager
    def inside(self, name: str) -> Iterator[Folder | None]:
        """The folder of that name; None where there is none.

        Raises:
            IntegrityError: it is a link or a file.
        """
        path = self.path / name
        try:
            fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise not_followed(path, "is no folder of its own, but a link or a file") from error
            raise disk.storage_error(path, error) from error
        try:
            yield Folder(fd, path)
        finally:
            os.close(fd)

    @contextmanager
    def made(self, name: str) -> Iterator[Folder]:
        """The folder of that name, made where there is none."""
        disk.make_folder(self.path / name, within=self.fd)
        with self.inside(name) as folder:
            if folder is None:
                raise IntegrityError(f"{self.path / name}: gone just after it was made", "run the command again")
            yield folder

    @contextmanager
    def holder(self, file: str) -> Iterator[tuple[Folder, str]]:
        """The folder that a file lies in, and the file's name there; `file` may be in folders below: `a/b.bin`.

        Raises:
            IntegrityError: a folder on the way is not there, is a link or a file.
        """
        *above, name = file.split("/")
        with ExitStack() as stack:
            folder = self
            for part in above:
                below = stack.enter_context(folder.inside(part))
                if below is None:
                    raise IntegrityError(f"{folder.path / part} is missing", "restore it from a copy")
                folder = below
            yield folder, name

    def open_file(self, name: str, *, write: bool = False) -> int:
        """A descriptor of a plain file; a FIFO is not waited for.

        Raises:
            IntegrityError: it is not there, or is a link, FIFO or the like.
            StorageError: the system refuses.
        """
        path = self.path / name
        kind = self.kind(name)
        if kind is None:
            raise IntegrityError(f"{path} is missing", "restore it from a copy")
        if kind != "file":  # a device is not even opened
            raise not_followed(path) if kind == "link" else not_followed(path, "is no plain file")
        if write:
            fd = disk.open_existing(path, within=self.fd)
        else:
            with disk.storage_errors(path):
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise not_followed(path, "is no plain file")
        return fd

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small plain file; None where there is none.

        Raises:
            IntegrityError: it is larger than `limit`; else as for `open_file`.
        """
        if self.kind(name) is None:
            return None
        fd = self.open_file(name)
        try:
            parts: list[bytes] = []
            left = limit + 1
            with disk.storage_errors(self.path / name):
                while left and (part := os.read(fd, min(left, 2**24))):
                    parts.append(part)
                    left -= len(part)
        finally:
            os.close(fd)
        if not left:
            raise IntegrityError(f"{self.path / name}: more than {limit:,} bytes", "restore it from a copy")
        return b"".join(parts)

    def create(self, name: str) -> int:
        return disk.create(self.path / name, within=self.fd)

    def replace(self, name: str, content: bytes) -> None:
        """Writes a small file whole: temporary, sync, rename, sync of the folder.

        What a killed run leaves of it, the owner of the folder clears away (see `is_left_of`).
        """
        temporary = fitting(name, before=".", after=f".{secrets.token_hex(4)}{SUFFIX}")
        fd = self.create(temporary)
        try:
            try:
                disk.write_at(fd, content, 0, self.path / temporary)
                disk.sync_file(fd, self.path / temporary)
            finally:
                os.close(fd)
            self.move(temporary, name)
        except BaseException:
            self.remove(temporary, missing_ok=True)
            raise
        self.sync()

    def move(self, old: str, new: str, to: Folder | None = None) -> None:
        """Renames in this folder, or to a name in the folder `to`."""
        target = self if to is None else to
        disk.rename(self.path / old, target.path / new, within=self.fd, to=target.fd)

    def remove(self, name: str, *, missing_ok: bool = False) -> None:
        disk.unlink(self.path / name, missing_ok=missing_ok, within=self.fd)

    def remove_folder(self, name: str) -> None:
        disk.remove_folder(self.path / name, within=self.fd)

    def remove_tree(self, name: str) -> None:
        disk.remove_tree(self.path / name, within=self.fd)

    def sync(self) -> None:
        disk.sync_folder(self.path, opened=self.fd)


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """Opens a folder by its path, links on which are followed: it is the user's own word."""
    with disk.storage_errors(path):
        fd = os.open(path, _FOLDER)
    try:
        yield Folder(fd, Path(os.path.realpath(path)))
    finally:
        os.close(fd)
