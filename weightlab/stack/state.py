"""What is on a checkpoint, as it lies in `.weightlab/` beside it.

    .weightlab/ANCHOR.stack/stack.json      the patches that are on, and the tensors that they touch
                            intent.json     a change that has begun (see `journal`)
                            originals/N.bin clean bytes of touched tensors, one file a change
                            patches/ID/     the patches themselves

ANCHOR is the checkpoint's file or index. Only file names are kept, never paths: a folder can be moved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from weightlab.errors import InputError, IntegrityError, StorageError
from weightlab.files.disk import read_exactly, storage_errors
from weightlab.files.foreign import strict_json
from weightlab.patches.fit import StackEntry
from weightlab.patches.header import Digest, canonical
from weightlab.patches.patch import open_patch, stand_in
from weightlab.sources.local import LocalSource
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

FOLDER = ".weightlab"
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PatchOn(_Strict):
    """A patch that is on. `name`: what its file was called, so that it can be named once the file is gone."""

    id: Digest
    name: str
    scale: float
    include: list[str] = []
    exclude: list[str] = []
    renames: dict[str, str] = {}


class Original(_Strict):
    file: str
    offset: int


class Touched(_Strict):
    """A tensor that some patch touches: digests of its clean and present bytes, its shard, its kept clean bytes."""

    clean: Digest
    now: Digest
    file: str
    original: Original


class StackState(_Strict):
    """The content of stack.json. `sequence` counts changes; `headers`: header digests of the touched shards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)

    schema_version: int = Field(default=1, alias="schema")
    sequence: int = 0
    patches: list[PatchOn] = []
    tensors: dict[str, Touched] = {}
    headers: dict[str, Digest] = {}


class Intent(_Strict):
    """A change that has begun: what the state will be, which shards are set aside, which tensors are rewritten."""

    new: StackState
    shards: list[str]
    rewrite: list[str]


@dataclass(frozen=True, slots=True)
class StatePlace:
    """The places of one checkpoint's state."""

    checkpoint: Path
    anchor: str

    @property
    def folder(self) -> Path:
        return self.checkpoint / FOLDER / f"{self.anchor}.stack"

    @property
    def stack(self) -> Path:
        return self.folder / "stack.json"

    @property
    def intent(self) -> Path:
        return self.folder / "intent.json"

    @property
    def originals(self) -> Path:
        return self.folder / "originals"

    @property
    def patches(self) -> Path:
        return self.folder / "patches"

    def patch(self, patch_id: str) -> Path:
        return self.patches / patch_id

    def read_stack(self) -> StackState:
        """The recorded state; an empty one when there is no record.

        Raises:
            IntegrityError: the record is damaged, or gone while clean bytes are still kept.
        """
        state = _read(self.stack, StackState)
        if state is None:
            if self.originals.is_dir() and any(self.originals.iterdir()):
                raise IntegrityError(
                    f"{self.stack} is gone, and clean bytes are kept beside it", "restore it, or drop all with --forget"
                )
            return StackState()
        return state

    def read_intent(self) -> Intent | None:
        return _read(self.intent, Intent)


def places(checkpoint: Path) -> list[StatePlace]:
    """All states that are kept in a checkpoint's folder."""
    folders = sorted((checkpoint / FOLDER).glob("*.stack")) if (checkpoint / FOLDER).is_dir() else []
    return [StatePlace(checkpoint, folder.name.removesuffix(".stack")) for folder in folders]


def pending(checkpoint: Path) -> list[StatePlace]:
    """The states of that folder in which a change has begun and not ended."""
    return [place for place in places(checkpoint) if place.intent.exists()]


def text_of(model: BaseModel) -> bytes:
    """A record as it is stored."""
    return canonical(model.model_dump(by_alias=True)).encode()


def _read(path: Path, model: type[Model]) -> Model | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return model.model_validate(strict_json(content))
    except (ValueError, ValidationError) as error:
        raise IntegrityError(f"{path}: damaged: {error}", "restore it, or drop the stack with --forget") from error


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
        try:
            patch = open_patch(place.patch(on.id))
            if patch.id != on.id:
                damaged[on.id] = f"is another patch ({patch.id})"
        except (InputError, IntegrityError, StorageError) as error:
            damaged[on.id] = error.message
        if on.id in damaged:
            patch = stand_in(place.patch(on.id), on.id)
        entries.append(StackEntry(patch, on.scale, tuple(on.include), tuple(on.exclude), on.renames))
    return entries, damaged


def damaged_patches(place: StatePlace, state: StackState, damaged: Mapping[str, str]) -> IntegrityError:
    """The error for kept patches that are needed and cannot be opened."""
    return IntegrityError(
        f"{place.checkpoint}: kept patches are missing or damaged",
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


class CleanSource:
    """A checkpoint as it would be without its patches: touched tensors are read from their kept clean bytes."""

    def __init__(self, source: LocalSource, originals: Path, touched: Mapping[str, Touched]) -> None:
        self._source, self._originals, self._touched = source, originals, touched
        self.label, self.path = source.label, source.path
        self.specs: Mapping[str, TensorSpec] = source.specs
        self.aliases, self.opaque, self.config = source.aliases, source.opaque, source.config
        self.codes: Mapping[str, Code] = source.codes
        self._descriptors: dict[str, int] = {}
        ends: dict[str, int] = {}
        for name, known in touched.items():
            size = source.specs[name].nbytes
            ends[known.original.file] = max(ends.get(known.original.file, 0), known.original.offset + size)
        for file, end in sorted(ends.items()):
            path = originals / file
            found = path.stat().st_size if path.is_file() else -1
            if found < end:
                self.close()
                what = "is missing" if found < 0 else f"has {found:,} bytes, and {end:,} were kept"
                raise IntegrityError(f"{path} {what}", "restore it, or drop the stack with --forget")
            with storage_errors(path):
                self._descriptors[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, name: str, start: int, out: Tensor) -> None:
        touched = self._touched.get(name)
        if touched is None:
            self._source.read(name, start, out)
        else:
            file = touched.original.file
            read_exactly(self._descriptors[file], touched.original.offset + start, out, self._originals / file)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
