"""Shards that are symbolic links or have other hard links: never written through."""

from __future__ import annotations

import stat
from collections.abc import Sequence

from weightlab.errors import IntegrityError
from weightlab.files import disk
from weightlab.files.folder import Folder
from weightlab.stack.state import COPIES, StatePlace


def linked_files(checkpoint: Folder, files: Sequence[str]) -> list[str]:
    """Those of the files that are symbolic links or have other names.

    Raises:
        IntegrityError: a file is gone, or lies in a folder that is a link.
    """
    linked: list[str] = []
    for file in files:
        with checkpoint.holder(file) as (folder, name):
            found = folder.look(name)
        if found is None:
            raise IntegrityError(f"{checkpoint.path / file} is missing", "restore it from a copy")
        if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1:
            linked.append(file)
    return linked


def own_copies(place: StatePlace, files: Sequence[str]) -> list[str]:
    """Replaces files by copies of their own; the content stays, so a crash does no harm. Returns notes.

    A copy is made within `.weightlab`, where one that a killed run left is known for what it is.
    """
    notes: list[str] = []
    for number, file in enumerate(files):
        with place.made(COPIES) as copies, place.checkpoint.holder(file) as (folder, name):
            temporary = f"{number}.copy"
            disk.copy_file(place.checkpoint.path / file, copies.path / temporary, within=copies.fd)
            disk.sync_path(copies.path / temporary, within=copies.fd)
            copies.move(temporary, name, to=folder)
        notes.append(f"{file} was a link; it is a copy of its own now")
    return notes
