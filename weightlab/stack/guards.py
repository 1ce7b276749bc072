"""Whether a checkpoint may be changed in place, and ending what an earlier change left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from weightlab.errors import IntegrityError, MissingInputError, NotPatchableError, WeightlabError
from weightlab.files.folder import Folder, open_folder
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.sources import Source
from weightlab.sources.local import INDEX_SUFFIX, LocalSource, find_anchor, shards_in
from weightlab.stack import journal
from weightlab.stack.clean import CleanSource
from weightlab.stack.elsewhere import refuse_elsewhere
from weightlab.stack.garbage import collect, tidy
from weightlab.stack.records import StackState
from weightlab.stack.signals import uninterrupted
from weightlab.stack.state import StatePlace, entries_of, pending, places
from weightlab.stream.executor import Resources

On: TypeAlias = tuple[str, StackEntry]
"""What a patch is called, and the patch as it is used."""

REMEDY = (
    "restore the files from a copy, or keep them and drop what weightlab knows of them: weightlab remove {} --forget"
)

_CHANGED = "{}: something else changed it while patches were on, so they cannot be taken off"


def folder_of(path: Path) -> Path:
    """The folder that a checkpoint lies in: what its lock is on."""
    return path if path.is_dir() else path.absolute().parent


def recover_all(checkpoint: Folder, resources: Resources) -> list[str]:
    """Ends whatever was interrupted in a folder, and removes what killed runs left in `.weightlab`.

    The caller holds the exclusive lock. Returns what was done.
    """
    notes: list[str] = []
    for place in places(checkpoint):
        with uninterrupted():
            done = journal.recover(place, resources)
            if done is None:
                collect(place)
        if done is not None:
            notes.append(f"{place.anchor}: {done}")
    tidy(checkpoint)
    return notes


def place_of(path: Path, checkpoint: Folder) -> StatePlace:
    """The place of a checkpoint's state. `checkpoint`: the open folder that it lies in.

    Raises:
        NotPatchableError: it cannot be changed in place; says why.
        IntegrityError: a change was interrupted and has not been undone, or the files are gone that patches are on.
    """
    if pending(checkpoint.path):
        raise IntegrityError(f"{path}: a change of it was interrupted", "run the command without --dry-run")
    refuse_gone(path, checkpoint)
    anchor = find_anchor(path)
    if anchor is None:
        if not path.exists():
            raise MissingInputError(f"{path}: no such file or folder", "check the path")
        raise NotPatchableError(
            f"{path}: only safetensors checkpoints are changed in place", "write a new checkpoint with --out"
        )
    parts = checkpoint.path.parts
    if any(p.startswith("models--") and "snapshots" in parts[i:] for i, p in enumerate(parts)):
        raise NotPatchableError(
            f"{path}: a snapshot in the Hub's cache is never changed in place: other programs rely on it",
            "write a new checkpoint with --out",
        )
    place = StatePlace(checkpoint, anchor.name)
    owners = [
        index.name
        for index in sorted(checkpoint.path.glob(f"*{INDEX_SUFFIX}"))
        if index.name != anchor.name and anchor.name in shards_in(index)
    ]
    if owners and not place.read_stack().patches:  # those that went on before the index came can come off
        raise NotPatchableError(
            f"{path}: one shard of a larger checkpoint", f"give the folder {folder_of(path)}", owners
        )
    return place


def recorded(path: Path, checkpoint: Folder) -> tuple[StatePlace, StackState] | None:
    """What is recorded as being on the checkpoint at `path`, whether or not its files can be read; None: nothing."""
    named = [p for p in places(checkpoint) if path.is_dir() or p.anchor == path.name]
    known = [(place, state) for place in named if (state := place.read_stack()).patches]
    for place, state in known:
        if not place.has_anchor():
            return place, state
    anchor = find_anchor(path) if known else None
    return next((found for found in known if anchor is not None and found[0].anchor == anchor.name), None)


def unreadable(path: Path, place: StatePlace, why: WeightlabError | None = None) -> IntegrityError:
    """The error for a checkpoint with patches on it that cannot be opened any more.

    Args:
        why: what opening it met; not needed where the file or index itself is gone.
    """
    if why is None or not place.has_anchor():
        return IntegrityError(_CHANGED.format(path), REMEDY.format(path), [f"{place.anchor}: not there any more"])
    return IntegrityError(_CHANGED.format(path), REMEDY.format(path), [why.message, *why.offenders])


def refuse_gone(path: Path, checkpoint: Folder) -> None:
    """Raises:
    IntegrityError: patches are on a file or index that is gone, as after a model was saved over it in another form.
    """
    found = recorded(path, checkpoint)
    if found is not None and not found[0].has_anchor():
        raise unreadable(path, found[0])


def check_unchanged(path: Path, source: LocalSource, state: StackState, resources: Resources) -> None:
    """Checks that the touched tensors are as weightlab left them.

    Raises:
        IntegrityError: lists every file and tensor that someone else changed.
    """
    wrong = [
        f"{file}: not the file that was patched"
        for file, digest in state.headers.items()
        if file not in source.headers or source.headers[file].digest != digest
    ]
    if not wrong:
        wrong = [f"{n}: not in the checkpoint any more" for n in state.tensors if n not in source.specs]
    if not wrong:
        found = digest_tensors(source, state.tensors, resources)
        wrong = [f"{n}: changed" for n, touched in state.tensors.items() if found[n] != touched.now]
    if wrong:
        raise IntegrityError(
            _CHANGED.format(path),
            REMEDY.format(path),
            wrong,
        )


def check_kept(path: Path, clean: CleanSource, state: StackState, names: Iterable[str], resources: Resources) -> None:
    """Reads the kept clean bytes of some touched tensors.

    Raises:
        IntegrityError: lists every tensor whose bytes are damaged.
    """
    found = digest_tensors(clean, names, resources)
    damaged = [name for name, digest in found.items() if digest != state.tensors[name].clean]
    if damaged:
        raise IntegrityError(f"{path}: kept clean bytes are damaged", REMEDY.format(path), sorted(damaged))


@contextmanager
def clean_view(source: Source, resources: Resources) -> Iterator[tuple[Source, list[On]]]:
    """A checkpoint without the patches that are on it, and those patches. The caller holds its lock.

    Raises:
        IntegrityError: the files, or the clean bytes that are kept, are not as weightlab left them.
    """
    if source.path is not None:
        with open_folder(folder_of(source.path)) as checkpoint:
            refuse_gone(source.path, checkpoint)
    if not isinstance(source, LocalSource):
        yield source, []
        return
    with open_folder(source.folder) as checkpoint:
        place = StatePlace(checkpoint, source.anchor)
        state = place.read_stack()
        refuse_elsewhere(Path(source.label), source)
        check_unchanged(Path(source.label), source, state, resources)
        on = [(record.name, entry) for record, entry in zip(state.patches, entries_of(place, state), strict=True)]
        clean = CleanSource(source, place, state.tensors)
    try:
        check_kept(Path(source.label), clean, state, state.tensors, resources)
        yield clean, on
    finally:
        clean.close()


def state_of(source: LocalSource) -> StackState:
    """What is recorded as being on a checkpoint under its own name."""
    with open_folder(source.folder) as checkpoint:
        return StatePlace(checkpoint, source.anchor).read_stack()
