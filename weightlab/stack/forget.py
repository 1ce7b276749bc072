"""Dropping the record of what is on a checkpoint."""

from __future__ import annotations

from pathlib import Path

from weightlab.files.folder import Folder
from weightlab.files.lock import folder_lock
from weightlab.stack.garbage import clear_dropped, dropped_name, remove_empty
from weightlab.stack.guards import folder_of
from weightlab.stack.journal import BUSY
from weightlab.stack.state import ENDING, FOLDER, INTENT, StatePlace


def forget(path: Path, wait: float) -> list[str]:
    """Drops the record of what is on a checkpoint and keeps its files as they are. Returns notes.

    A record goes by one rename, so that a kill leaves it whole or leaves none. What it says is not read and links in it
    are not followed: a record that is damaged, or made by someone who means harm, can be dropped too.

    Raises:
        IntegrityError: `.weightlab` itself is a link.
    """
    notes: list[str] = []
    with folder_lock(folder_of(path), exclusive=True, wait=wait) as checkpoint:
        with checkpoint.inside(FOLDER) as top:
            if top is not None:
                clear_dropped(top)  # the names are free again
                whole = path.is_dir()
                ours = StatePlace(checkpoint, path.name).name
                for name in top.names():
                    if name == ours or (whole and name.endswith(ENDING)):
                        notes += _drop(checkpoint, top, name)
                    elif whole and top.kind(name) == "link":
                        top.remove(name)
                        notes.append(f"{top.path / name}: a link, removed")
                clear_dropped(top)
        remove_empty(checkpoint, FOLDER)
        checkpoint.sync()
    return notes


def _drop(checkpoint: Folder, top: Folder, name: str) -> list[str]:
    begun = False
    if top.kind(name) == "folder":
        with top.inside(name) as folder:
            begun = folder is not None and folder.kind(INTENT) is not None
        top.move(name, dropped_name(name))
    else:
        top.remove(name)
    top.sync()
    notes = [f"{name.removesuffix(ENDING)}: its kept clean bytes and patches are removed"]
    left = [n for n in checkpoint.names() if n.endswith(BUSY)] if begun else []
    return notes + [f"{n}: half written, left where it is; do not use it" for n in left]
