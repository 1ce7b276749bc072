"""What is on a checkpoint, as it lies in `.weightlab/` beside it.

    .weightlab/ANCHOR.stack/stack.json      the patches that are on, and the tensors that they touch
                            intent.json     a change that has begun (see `journal`)
                            originals/N.bin clean bytes of touched tensors, one file a change
                            patches/ID/     the patches themselves
                            copies/         a shard's copy in the making, where the shard is a link

ANCHOR is the checkpoint's file or index (shortened where its name is very long). Only file names are kept, never paths:
a folder can be moved. All of it may have come from someone else: it is reached through descriptors, name by name, and
a link anywhere in it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightlab.errors import InputError, IntegrityError, StorageError
from weightlab.files.folder import Folder, open_folder
from weightlab.files.temporary import fitting
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch, open_patch, stand_in
from weightlab.stack.records import DROP, Intent, PatchOn, StackState, read_record

FOLDER = ".weightlab"
STACK, INTENT = "stack.json", "intent.json"
ORIGINALS, PATCHES, COPIES = "originals", "patches", "copies"
ENDING = ".stack"
"""Ends the name of a state's folder."""
_SHORTENED = re.compile(r"~[0-9a-f]{32}\.stack$")
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class StatePlace:
    """The place of one checkpoint's state. `checkpoint`: the open folder that the checkpoint lies in."""

    checkpoint: Folder
    anchor: str

    @property
    def name(self) -> str:
        return fitting(self.anchor, after=ENDING)

    @property
    def path(self) -> Path:
        """For messages."""
        return self.checkpoint.path / FOLDER / self.name

    @contextmanager
    def opened(self, *below: str) -> Iterator[Folder | None]:
        """The state's folder, or one below it; None where there is none."""
        with ExitStack() as stack:
            folder: Folder | None = self.checkpoint
            for name in (FOLDER, self.name, *below):
                folder = stack.enter_context(folder.inside(name)) if folder is not None else None
            yield folder

    @contextmanager
    def made(self, *below: str) -> Iterator[Folder]:
        """The state's folder, or one below it, made where there is none."""
        with ExitStack() as stack:
            folder = self.checkpoint
            for name in (FOLDER, self.name, *below):
                folder = stack.enter_context(folder.made(name))
            yield folder

    def empty_state(self) -> StackState:
        """The state of a checkpoint with nothing on it."""
        return StackState(anchor=self.anchor if _SHORTENED.search(self.name) else None)

    def read_stack(self) -> StackState:
        """The recorded state; an empty one when there is no record.

        Raises:
            IntegrityError: the record is damaged, or gone while clean bytes are still kept.
        """
        with self.opened() as folder:
            state = None if folder is None else read_record(folder, STACK, StackState)
        if state is not None:
            return state
        with self.opened(ORIGINALS) as originals:
            if originals is not None and originals.names():
                raise IntegrityError(f"{self.path / STACK} is gone, and clean bytes are kept beside it", DROP)
        return self.empty_state()

    def read_intent(self) -> Intent | None:
        with self.opened() as folder:
            return None if folder is None else read_record(folder, INTENT, Intent)

    def has_intent(self) -> bool:
        with self.opened() as folder:
            return folder is not None and folder.kind(INTENT) is not None

    def has_anchor(self) -> bool:
        """Whether the file or index is there; it may be a link, as in a cache."""
        return os.path.isfile(self.checkpoint.path / self.anchor)


def places(checkpoint: Folder) -> list[StatePlace]:
    """All states that are kept in a checkpoint's folder.

    Raises:
        IntegrityError: lists every link in `.weightlab`.
    """
    with checkpoint.inside(FOLDER) as top:
        if top is None:
            return []
        links = list(_links(top, 0))
        if links:
            raise IntegrityError(
                f"{top.path}: holds symbolic links, and weightlab makes none",
                "remove the links; who made this folder may mean harm",
                links,
            )
        names = [n for n in top.names() if n.endswith(ENDING) and top.kind(n) == "folder"]
        return [StatePlace(checkpoint, _anchor_of(top, name)) for name in names]


def _anchor_of(top: Folder, name: str) -> str:
    if _SHORTENED.search(name):
        with top.inside(name) as folder:
            state = None if folder is None else read_record(folder, STACK, StackState)
        if state is not None and state.anchor is not None:
            if fitting(state.anchor, after=ENDING) != name:
                raise IntegrityError(f"{top.path / name / STACK}: is for a file of another name", DROP)
            return state.anchor
    return name.removesuffix(ENDING)


def _links(folder: Folder, depth: int) -> Iterator[str]:
    for name in folder.names():
        kind = folder.kind(name)
        if kind == "link":
            yield str(folder.path / name)
        elif kind == "folder" and depth < _DEEPEST:
            with folder.inside(name) as below:
                if below is not None:
                    yield from _links(below, depth + 1)


def pending(checkpoint: Path) -> list[str]:
    """The records in that folder of changes that have begun and not ended: what to call each in a message.

    Raises:
        IntegrityError: see `places`.
    """
    if not checkpoint.is_dir():
        return []
    with open_folder(checkpoint) as folder:
        return [f"{p.anchor}: see {p.path / INTENT}" for p in places(folder) if p.has_intent()]


def entries_of(place: StatePlace, state: StackState) -> list[StackEntry]:
    """The recorded patches, opened.

    Raises:
        IntegrityError: lists every patch that is kept and damaged.
    """
    entries, damaged = kept_entries(place, state)
    if damaged:
        raise damaged_patches(place, state, damaged)
    return entries


def kept_entries(place: StatePlace, state: StackState) -> tuple[list[StackEntry], dict[str, str]]:
    """The recorded patches, opened, and {id: what is wrong} of those that cannot be.

    In the place of such a one stands a patch without tensors: enough to take it off, which needs the clean bytes only.
    """
    entries: list[StackEntry] = []
    damaged: dict[str, str] = {}
    for on in state.patches:
        path = place.path / PATCHES / on.id
        try:
            with place.opened(PATCHES) as patches:
                patch = open_kept(patches, on.id) if patches is not None else open_patch(path)
            if patch.id != on.id:
                damaged[on.id] = f"is another patch ({patch.id})"
        except (InputError, IntegrityError, StorageError) as error:
            damaged[on.id] = error.message
        if on.id in damaged:
            patch = stand_in(path, on.id)
        entries.append(StackEntry(patch, on.scale, tuple(on.include), tuple(on.exclude), on.renames))
    return entries, damaged


def open_kept(patches: Folder, name: str) -> Patch:
    """Opens a patch that is kept: its files are plain ones in its own folder, and stay those that were looked at.

    Raises:
        IntegrityError: a file is a link or none, or was swapped for another meanwhile; else as for `open_patch`.
    """
    with patches.inside(name) as folder:
        if folder is None:
            return open_patch(patches.path / name)
        odd = [n for n in folder.names() if folder.kind(n) != "file"]
        if odd:
            raise IntegrityError(f"{folder.path}: holds what is no plain file", DROP, odd)
        patch = open_patch(folder.path)
        for file, opened in patch.opened_files().items():
            found = folder.look(file)
            if found is None or not os.path.samestat(found, opened):
                raise IntegrityError(f"{folder.path / file}: swapped while it was opened", DROP)
        return patch


def damaged_patches(place: StatePlace, state: StackState, damaged: Mapping[str, str]) -> IntegrityError:
    """The error for kept patches that are needed and cannot be opened."""
    return IntegrityError(
        f"{place.checkpoint.path}: kept patches are missing or damaged",
        "take them off (`weightlab remove MODEL ID` needs the clean bytes only), or restore them from a copy",
        [f"{on.name} ({on.id[:12]}): {damaged[on.id]}" for on in state.patches if on.id in damaged],
    )


def record_of(entry: StackEntry, name: str) -> PatchOn:
    """How a patch is recorded; `name`: what its file is called, so that it can be named once the file is gone."""
    return PatchOn(
        id=entry.patch.id,
        name=name,
        scale=entry.scale,
        include=list(entry.include),
        exclude=list(entry.exclude),
        renames=dict(entry.renames),
    )
