"""What in `.weightlab/` is of no more use: what a change leaves when it ends, and what killed runs left.

Only what weightlab makes there is taken for garbage, by its name, its kind and its place. The caller holds the lock.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext

from weightlab.files.folder import Folder, Kind
from weightlab.files.temporary import fitting
from weightlab.stack.records import StackState
from weightlab.stack.state import COPIES, FOLDER, INTENT, ORIGINALS, PATCHES, STACK, StatePlace, places

# {folder in the state's own: (its files' names, what they are)}
_OURS: dict[str, tuple[re.Pattern[str], Kind]] = {
    ORIGINALS: (re.compile(r"[0-9]+\.bin|\.[0-9]+\.bin\.partial"), "file"),
    PATCHES: (re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.partial"), "folder"),
    COPIES: (re.compile(r"[0-9]+\.copy"), "file"),
    "": (re.compile(rf"\.({re.escape(STACK)}|{re.escape(INTENT)})\.[0-9a-f]{{8}}\.partial"), "file"),
}
_DROPPED = ".dropped"


def garbage(folder: Folder, state: StackState) -> Iterator[tuple[str, str]]:
    """What is in a state's folder and not used in that state: (folder below it, or "" for itself; name)."""
    used = {ORIGINALS: {t.original.file for t in state.tensors.values()}, PATCHES: {p.id for p in state.patches}}
    for below, (form, kind) in _OURS.items():
        with folder.inside(below) if below else nullcontext(folder) as inner:
            if inner is None:
                continue
            for name in inner.names():
                if form.fullmatch(name) and name not in used.get(below, ()) and inner.kind(name) == kind:
                    yield below, name


def collect(place: StatePlace) -> None:
    """Removes kept bytes and patches that nothing refers to; everything, when no patch is on. Safe to repeat."""
    state = place.read_stack()
    with place.opened() as folder:
        if folder is not None:
            _collect(folder, state)
    with place.checkpoint.inside(FOLDER) as top:
        if top is not None:
            remove_empty(top, place.name)
    remove_empty(place.checkpoint, FOLDER)
    place.checkpoint.sync()


def _collect(folder: Folder, state: StackState) -> None:
    for below, name in list(garbage(folder, state)):
        with folder.inside(below) if below else nullcontext(folder) as inner:
            if inner is not None:
                inner.remove_tree(name) if inner.kind(name) == "folder" else inner.remove(name)
    remove_empty(folder, COPIES)
    if state.patches or state.tensors:
        return
    with folder.inside(ORIGINALS) as originals:
        if originals is not None:
            originals.sync()  # the record goes after what it vouches for
    folder.remove(STACK, missing_ok=True)
    for name in (ORIGINALS, PATCHES):
        remove_empty(folder, name)


def untidy(checkpoint: Folder) -> bool:
    """Whether a killed run left something in `.weightlab` that `tidy` removes. (Or a run is at work just now.)"""
    with checkpoint.inside(FOLDER) as top:
        if top is None:
            return False
        names = top.names()
        if not names or any(n.endswith(_DROPPED) for n in names):
            return True
    return any(_untidy(place) for place in places(checkpoint))


def _untidy(place: StatePlace) -> bool:
    state = place.read_stack()
    with place.opened() as folder:
        return folder is not None and (not state.patches or any(garbage(folder, state)))


def tidy(checkpoint: Folder) -> None:
    """Removes records that were being dropped, and `.weightlab` when nothing is in it."""
    with checkpoint.inside(FOLDER) as top:
        if top is None:
            return
        clear_dropped(top)
    remove_empty(checkpoint, FOLDER)


def dropped_name(name: str) -> str:
    """What the folder of a state is called once it is dropped and being removed."""
    return fitting(name, before=".", after=_DROPPED)


def clear_dropped(top: Folder) -> None:
    for name in top.names():
        if name.startswith(".") and name.endswith(_DROPPED) and top.kind(name) == "folder":
            top.remove_tree(name)


def remove_empty(folder: Folder, name: str) -> None:
    """Removes the folder of that name if it is there and empty."""
    with folder.inside(name) as inner:
        empty = inner is not None and not inner.names()
    if empty:
        folder.remove_folder(name)
