"""Whether a checkpoint may be changed in place, and ending what an earlier change left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from weightlab.errors import IntegrityError, MissingInputError, NotPatchableError, WeightlabError
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.sources import Source
from weightlab.sources.local import INDEX_SUFFIX, LocalSource, find_anchor, shards_in
from weightlab.stack import journal
from weightlab.stack.signals import uninterrupted
from weightlab.stack.state import CleanSource, StackState, StatePlace, entries_of, pending, places
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


def recover_all(folder: Path, resources: Resources) -> list[str]:
    """Ends whatever was interrupted in a folder; the caller holds the exclusive lock. Returns what was done."""
    notes: list[str] = []
    for place in places(folder):
        with uninterrupted():
            done = journal.recover(place, resources)
            if done is None:
                journal.collect_garbage(place)
        if done is not None:
            notes.append(f"{place.anchor}: {done}")
    return notes


def place_of(path: Path) -> StatePlace:
    """The place of a checkpoint's state.

    Raises:
        NotPatchableError: it cannot be changed in place; says why.
        IntegrityError: a change was interrupted and has not been undone, or the files are gone that patches are on.
    """
    folder = folder_of(path)
    begun = pending(folder)
    if begun:
        raise IntegrityError(f"{path}: a change of it was interrupted", "run the command without --dry-run")
    refuse_gone(path)
    anchor = find_anchor(path)
    if anchor is None:
        if not path.exists():
            raise MissingInputError(f"{path}: no such file or folder", "check the path")
        raise NotPatchableError(
            f"{path}: only safetensors checkpoints are changed in place", "write a new checkpoint with --out"
        )
    resolved = folder.resolve()
    if any(p.startswith("models--") and "snapshots" in resolved.parts[i:] for i, p in enumerate(resolved.parts)):
        raise NotPatchableError(
            f"{path}: a snapshot in the Hub's cache is never changed in place: other programs rely on it",
            "write a new checkpoint with --out",
        )
    owners = [
        index.name
        for index in sorted(folder.glob(f"*{INDEX_SUFFIX}"))
        if index.name != anchor.name and anchor.name in shards_in(index)
    ]
    if owners:
        raise NotPatchableError(f"{path}: one shard of a larger checkpoint", f"give the folder {folder}", owners)
    return StatePlace(resolved, anchor.name)


def recorded(path: Path) -> tuple[StatePlace, StackState] | None:
    """What is recorded as being on the checkpoint at `path`, whether or not its files can be read; None: nothing."""
    folder = folder_of(path)
    named = [p for p in places(folder) if path.is_dir() or p.anchor == path.name]
    known = [(place, state) for place in named if (state := place.read_stack()).patches]
    for place, state in known:
        if not (folder / place.anchor).is_file():
            return place, state
    anchor = find_anchor(path) if known else None
    return next((found for found in known if anchor is not None and found[0].anchor == anchor.name), None)


def unreadable(path: Path, place: StatePlace, why: WeightlabError | None = None) -> IntegrityError:
    """The error for a checkpoint with patches on it that cannot be opened any more.

    Args:
        why: what opening it met; not needed where the file or index itself is gone.
    """
    if why is None or not (place.checkpoint / place.anchor).is_file():
        return IntegrityError(_CHANGED.format(path), REMEDY.format(path), [f"{place.anchor}: not there any more"])
    return IntegrityError(_CHANGED.format(path), REMEDY.format(path), [why.message, *why.offenders])


def refuse_gone(path: Path) -> None:
    """Raises:
    IntegrityError: patches are on a file or index that is gone, as after a model was saved over it in another form.
    """
    found = recorded(path)
    if found is not None and not (found[0].checkpoint / found[0].anchor).is_file():
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
        refuse_gone(source.path)
    if not isinstance(source, LocalSource):
        yield source, []
        return
    place = StatePlace(source.folder, source.anchor)
    state = place.read_stack()
    check_unchanged(Path(source.label), source, state, resources)
    on = [(record.name, entry) for record, entry in zip(state.patches, entries_of(place, state), strict=True)]
    clean = CleanSource(source, place.originals, state.tensors)
    try:
        check_kept(Path(source.label), clean, state, state.tensors, resources)
        yield clean, on
    finally:
        clean.close()
