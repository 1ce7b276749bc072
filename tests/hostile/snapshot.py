"""What a part of the file system looks like, so that a test sees whatever a command did to it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path

Entry = tuple[object, ...]


def snapshot(root: Path, without: Collection[Path] = ()) -> dict[str, Entry]:
    """{relative path: kind and mode, inode, size, time of change, content or target} of all below a folder.

    Args:
        without: what is left out with all that is below it; the folder that it is in counts without its times.
    """
    found: dict[str, Entry] = {}
    todo = [root]
    while todo:
        place = todo.pop()
        for entry in os.scandir(place):
            path = Path(entry.path)
            if path in without:
                continue
            found[str(path.relative_to(root))] = _entry(path)
            if entry.is_dir(follow_symlinks=False):
                todo.append(path)
    return found


def _entry(path: Path) -> Entry:
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        inside = os.readlink(path)
    elif stat.S_ISREG(state.st_mode):
        inside = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        inside = ""
    return state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns, inside


def changes(before: dict[str, Entry], after: dict[str, Entry]) -> list[str]:
    """What is gone, new or otherwise."""
    return [
        f"{path}: {before.get(path)} → {after.get(path)}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]
