"""The patches that are on a checkpoint: taking them off, changing their strength, saying what is on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from weightlab.errors import (
    BusyError,
    InputError,
    IntegrityError,
    MissingInputError,
    NotPatchableError,
    StackError,
    StorageError,
    UsageError,
    WeightlabError,
)
from weightlab.files.folder import open_folder
from weightlab.files.lock import folder_lock
from weightlab.ops.operands import PatchesLike, PatchLike, PathLike, listed, model_path, parse_patch, reading
from weightlab.ops.outcome import Outcome, PatchOnInfo, Status, outcome_of
from weightlab.patches.patch import Patch, is_patch, open_patch
from weightlab.sources.local import LocalSource
from weightlab.stack.elsewhere import elsewhere, patched_elsewhere
from weightlab.stack.forget import forget
from weightlab.stack.garbage import untidy
from weightlab.stack.guards import (
    On,
    check_unchanged,
    folder_of,
    recorded,
    recover_all,
    refuse_gone,
    state_of,
    unreadable,
)
from weightlab.stack.records import StackState
from weightlab.stack.state import FOLDER, ORIGINALS, StatePlace, pending, places
from weightlab.stack.transaction import ChangeOptions, Links, change
from weightlab.stream.executor import Resources
from weightlab.tensors.arithmetic import round_scale

_LEAST_OF_AN_ID = 4


def remove(
    model: PathLike,
    patches: PatchesLike = (),
    *,
    everything: bool = False,
    drop_record: bool = False,
    links: Links = "refuse",
    allow_nonfinite: bool = False,
    wait: float = 0.0,
    dry_run: bool = False,
    resources: Resources | None = None,
) -> Outcome:
    """Takes patches off a checkpoint; the last one leaves its first bytes and no trace.

    Args:
        patches: paths, what their files were called, or the beginning of their ids (the files may be gone); or patches.
        everything: take all off.
        drop_record: only forget what is on, and keep the files as they are.
        links, allow_nonfinite, wait, dry_run: see `ChangeOptions`.

    Raises:
        StackError: a patch is not on; lists what is.
        IntegrityError: the files are not as weightlab left them; nothing is written.
    """
    operands = listed(patches)
    if everything + drop_record + bool(operands) != 1:
        raise UsageError("say what to take off", "name patches, or --all, or --forget")
    if drop_record:
        if dry_run:
            raise UsageError("--forget has no dry run", "see what is on with `weightlab status`")
        return Outcome(os.fspath(model), notes=_forget(Path(model), wait))
    for operand in operands:
        if not isinstance(operand, Patch) and parse_patch(os.fspath(operand))[1] is not None:
            raise UsageError(f"{os.fspath(operand)}: a patch is taken off whole", "leave out the scale")

    def decide(on: Sequence[On]) -> list[On]:
        gone = {entry.patch.id for _, entry in on} if everything else _find(model, on, operands)
        return [(name, entry) for name, entry in on if entry.patch.id not in gone]

    return _change(model, decide, ChangeOptions(links, allow_nonfinite, wait, dry_run, resources or Resources()))


def _forget(path: Path, wait: float) -> list[str]:
    if not path.exists() and not os.path.lexists(
        folder_of(path) / FOLDER
    ):  # while a change is interrupted, the file may be missing
        raise MissingInputError(f"{path}: no such file or folder", "check the path")
    return forget(path, wait) or ["nothing was on it"]


def scale(
    model: PathLike,
    patch: PatchLike,
    scale: float,
    *,
    links: Links = "refuse",
    allow_nonfinite: bool = False,
    wait: float = 0.0,
    dry_run: bool = False,
    resources: Resources | None = None,
) -> Outcome:
    """Changes the strength of a patch that is on; every tensor is computed from its clean bytes.

    Raises:
        UsageError: the scale is no finite number of fp32.
        StackError: the patch is not on; lists what is.
    """
    new = round_scale(scale)

    def decide(on: Sequence[On]) -> list[On]:
        (found,) = _find(model, on, [patch])
        return [(name, replace(entry, scale=new) if entry.patch.id == found else entry) for name, entry in on]

    return _change(model, decide, ChangeOptions(links, allow_nonfinite, wait, dry_run, resources or Resources()))


def status(model: PathLike, *, dry_run: bool = False, wait: float = 0.0, resources: Resources | None = None) -> Status:
    """Says what is on a checkpoint and whether its files are as weightlab left them; ends what was interrupted.

    Args:
        dry_run: look only, and write nothing.

    Raises:
        IntegrityError: what is needed to undo an interrupted change is damaged; in a dry run: there is one.
    """
    resources = resources or Resources()
    path = Path(model)
    folder = folder_of(path)
    notes = _put_in_order(folder, wait, resources) if folder.is_dir() and not dry_run else []
    try:
        with reading(model_path(path), wait=wait) as source, open_folder(folder) as checkpoint:
            refuse_gone(path, checkpoint)
            if not isinstance(source, LocalSource):
                return Status(os.fspath(model), notes=notes)
            return _status(os.fspath(model), source, notes, resources)
    except (InputError, IntegrityError) as error:
        if not folder.is_dir() or pending(folder):
            raise
        with open_folder(folder) as checkpoint:
            found = recorded(path, checkpoint)
            if found is None:
                raise
            place, state = found
            wrong = error if isinstance(error, IntegrityError) else unreadable(path, place, error)
            return Status(
                os.fspath(model), _on(state), len(state.tensors), _kept(place), False, [*notes, *_lines(wrong)]
            )


def _put_in_order(folder: Path, wait: float, resources: Resources) -> list[str]:
    """Ends what was interrupted in a folder, and removes what killed runs left. Returns what was done."""
    if pending(folder):
        with folder_lock(folder, exclusive=True, wait=wait) as checkpoint:
            return recover_all(checkpoint, resources)
    with open_folder(folder) as checkpoint:
        left = untidy(checkpoint)
    if left:  # by a change that ended before it began, unless it is under way just now
        try:
            with folder_lock(folder, exclusive=True) as checkpoint:
                return recover_all(checkpoint, resources)
        except BusyError:
            return []
        except (NotPatchableError, StorageError) as error:  # no locks, or a disk that is only read
            return [f"what an interrupted run left is still there: {error.message}"]
    return []


def _kept(place: StatePlace) -> int:
    with place.opened(ORIGINALS) as originals:
        found = [] if originals is None else [originals.look(name) for name in originals.names()]
    return sum(f.st_size for f in found if f is not None)


def _status(model: str, source: LocalSource, notes: list[str], resources: Resources) -> Status:
    found = list(elsewhere(source))
    if found:
        lines = _lines(patched_elsewhere(Path(model), found))
        patches = [on for f in found for on in _on(f.state)]
        return Status(model, patches, sum(len(f.state.tensors) for f in found), 0, False, [*notes, *lines])
    state = state_of(source)
    intact = True
    try:
        check_unchanged(Path(model), source, state, resources)
    except IntegrityError as error:
        intact = False
        notes = [*notes, *_lines(error)]
    if Path(model).is_dir():
        with open_folder(Path(model)) as checkpoint:
            notes += [
                f"patches are on {p.anchor} beside it: see `weightlab status {Path(model) / p.anchor}`"
                for p in places(checkpoint)
                if p.anchor != source.anchor and p.read_stack().patches
            ]
    kept = sum(source.specs[n].nbytes for n in state.tensors if n in source.specs)
    return Status(model, _on(state), len(state.tensors), kept, intact, notes)


def _on(state: StackState) -> list[PatchOnInfo]:
    return [PatchOnInfo(p.id, p.name, p.scale) for p in state.patches]


def _lines(error: WeightlabError) -> list[str]:
    return [error.message, *error.offenders, error.remedy]


def _change(model: PathLike, decide: Callable[[Sequence[On]], list[On]], options: ChangeOptions) -> Outcome:
    return outcome_of(model, change(Path(model), decide, options), options.dry_run)


def _find(model: PathLike, on: Sequence[On], operands: Sequence[PatchLike]) -> set[str]:
    """The ids of the patches that are meant: by file, then by the name of the file, then by the beginning of the id."""
    found: set[str] = set()
    missing: list[str] = []
    for operand in operands:
        ids = _matching(on, operand)
        if len(ids) == 1:
            found |= ids
        else:
            label = operand.label if isinstance(operand, Patch) else os.fspath(operand)
            missing.append(f"{label}: {'is not on' if not ids else 'could be ' + ' or '.join(sorted(ids))}")
    if missing:
        there = ", ".join(f"{name} ({entry.patch.id[:12]}) at {entry.scale:g}" for name, entry in on)
        raise StackError(
            f"{os.fspath(model)}: no such patch is on", f"what is on: {there}" if there else "no patch is on", missing
        )
    return found


def _matching(on: Sequence[On], operand: PatchLike) -> set[str]:
    ids = {entry.patch.id for _, entry in on}
    if isinstance(operand, Patch):
        return ids & {operand.id}
    text = os.fspath(operand)
    path = Path(text)
    if path.exists() and is_patch(path):
        return ids & {open_patch(path).id}
    named = {entry.patch.id for name, entry in on if name in (text, path.name)}
    if named:
        return named
    return {i for i in ids if len(text) >= _LEAST_OF_AN_ID and i.startswith(text.lower())}
