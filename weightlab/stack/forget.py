"""Dropping the record of what is on a checkpoint."""

from __future__ import annotations

from pathlib import Path

from weightlab.files import disk
from weightlab.files.lock import folder_lock
from weightlab.stack import journal
from weightlab.stack.guards import folder_of
from weightlab.stack.state import FOLDER, places


def forget(path: Path, wait: float) -> list[str]:
    """Drops the record of what is on a checkpoint and keeps its files as they are. Returns notes."""
    folder = folder_of(path)
    with folder_lock(folder, exclusive=True, wait=wait):
        chosen = [p for p in places(folder) if path.is_dir() or p.anchor == path.name]
        notes = [f"{p.anchor}: its kept clean bytes and patches are removed" for p in chosen]
        for place in chosen:
            left = [s.name for s in sorted(folder.glob(f"*{journal.BUSY}"))] if place.intent.exists() else []
            notes += [f"{name}: half written, left where it is; do not use it" for name in left]
            disk.remove_tree(place.folder)
        if (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
            disk.remove_folder(folder / FOLDER)
        disk.sync_folder(folder)
    return notes
