"""Shards that are symbolic links or have other hard links: never written through."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path

from weightlab.files import disk
from weightlab.files.atomic import SUFFIX


def linked_files(folder: Path, files: Sequence[str]) -> list[str]:
    """Those of the files that are symbolic links or have other names."""
    states = {file: os.lstat(folder / file) for file in files}
    return [f for f, found in states.items() if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1]


def own_copies(folder: Path, files: Sequence[str]) -> list[str]:
    """Replaces files by copies of their own; the content stays, so a crash does no harm. Returns notes."""
    notes: list[str] = []
    for file in files:
        path = folder / file
        temporary = path.with_name(f".{file}.{secrets.token_hex(4)}{SUFFIX}")
        try:
            disk.copy_file(path, temporary)
            disk.sync_path(temporary)
            disk.rename(temporary, path)
        except BaseException:
            disk.unlink(temporary, missing_ok=True)
            raise
        notes.append(f"{file} was a link; it is a copy of its own now")
    return notes
