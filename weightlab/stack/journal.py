"""Changing a checkpoint in place so that a crash at any moment leaves it as before or as after.

The order is fixed; each line is durable before the next begins:

    1. lock; finish or undo a change that was interrupted
    2. read everything, compute every result once without writing it, keep the clean bytes under a temporary name
    3. clean bytes and patches get their names
    4. intent.json: the change has begun
    5. touched shards are renamed to NAME.weightlab-busy, then written
    6. stack.json: the change is done
    7. names back, intent gone, then whatever is no longer needed

So a killed run leaves a shard missing (no loader takes that for a model), never a mixture that loads. Until step 6
recovery goes back, computing the old state from the kept clean bytes; after it, forward. It also goes forward where
the old state cannot be computed any more and the new one can: a damaged patch was being taken off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weightlab.errors import InputError, IntegrityError
from weightlab.files import disk
from weightlab.files.digest import Turns, tensor_hasher
from weightlab.files.temporary import fitting
from weightlab.patches.compute import Offences, compute_tile, read_clean
from weightlab.patches.fit import Target, fit
from weightlab.sources import Source
from weightlab.sources.local import LocalSource, open_anchor
from weightlab.stack.clean import CleanSource
from weightlab.stack.garbage import collect
from weightlab.stack.records import DROP, Intent, StackState, text_of
from weightlab.stack.state import INTENT, STACK, StatePlace, entries_of
from weightlab.stream.executor import Progress, Resources, run
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace

BUSY = ".weightlab-busy"

_FINISHED = "finished a change that was interrupted"


def busy_name(file: str) -> str:
    """What a shard is called while it is set aside, in the folder in which it lies."""
    above, slash, name = file.rpartition("/")
    return above + slash + fitting(name, after=BUSY)


def results(
    clean: Source,
    targets: Sequence[Target],
    resources: Resources,
    *,
    allow_nonfinite: bool,
    keep: Mapping[str, tuple[int, int, Path]] | None = None,
    write: Mapping[str, tuple[int, int, Path]] | None = None,
) -> dict[str, tuple[str, str]]:
    """Computes tensors tile by tile: {name: (digest of the clean bytes, digest of the result)}.

    Args:
        keep: where clean bytes are to be kept: {name: (descriptor, offset, path)}.
        write: where results are to be written, likewise; None: they are only digested.

    Raises:
        NonFiniteError, RangeError: lists every tensor whose result cannot be stored.
    """
    turns, offences = Turns(), Offences()
    progress = Progress(sum(t.spec.nbytes for t in targets), resources.progress)
    hashers = {
        t.spec.name: (tensor_hasher(t.spec.dtype, t.spec.shape), tensor_hasher(t.result.dtype, t.result.shape))
        for t in targets
    }

    def tasks() -> Iterator[tuple[int, Target, int, int]]:
        index = 0
        for target in targets:
            for start, stop in tiles(target.spec.stored.numel):
                yield index, target, start, stop
                index += 1

    def work(task: tuple[int, Target, int, int], workspace: Workspace) -> None:
        index, target, start, stop = task
        name, size = target.spec.name, target.spec.stored.type.itemsize
        raw = read_clean(clean, target, start, stop, workspace)
        result = compute_tile(target, start, stop, raw, workspace, offences, allow_nonfinite) if target.terms else raw
        if keep is not None and name in keep:
            fd, offset, path = keep[name]
            disk.write_at(fd, raw.numpy(), offset + start * size, path)
        if write is not None:
            fd, offset, path = write[name]
            disk.write_at(fd, result.numpy(), offset + start * size, path)
        with turns.turn(index):
            hashers[name][0].update(raw.numpy().data)
            hashers[name][1].update(result.numpy().data)
        progress.advance(raw.numel())

    run(tasks(), work, resources, turns)
    offences.raise_any()
    return {name: (a.hexdigest(), b.hexdigest()) for name, (a, b) in hashers.items()}


def begin(place: StatePlace, intent: Intent) -> None:
    """Steps 4 and the first half of 5: records the intent and sets the shards aside."""
    with place.made() as folder:
        folder.replace(INTENT, text_of(intent))
    _set_aside(place, intent.shards)


def _set_aside(place: StatePlace, shards: Sequence[str]) -> None:
    for shard in shards:
        with place.checkpoint.holder(shard) as (folder, name):
            folder.move(name, busy_name(name))
    _sync_names(place, shards)


def _sync_names(place: StatePlace, shards: Sequence[str]) -> None:
    for beside in sorted({shard.rpartition("/")[0]: shard for shard in shards}.values()):
        with place.checkpoint.holder(beside) as (folder, _):
            folder.sync()


def write_shards(
    place: StatePlace,
    source: LocalSource,
    clean: Source,
    targets: Sequence[Target],
    expected: Mapping[str, str],
    resources: Resources,
    *,
    allow_nonfinite: bool,
) -> None:
    """The second half of step 5: computes and writes tensors into shards that are set aside; durable on return.

    Raises:
        IntegrityError: a result is not the one that was computed before; or a shard is a link or has other names.
    """
    files = sorted({source.file_of[t.spec.name] for t in targets})
    paths = {f: place.checkpoint.path / busy_name(f) for f in files}
    descriptors: dict[str, int] = {}
    try:
        for file in files:
            descriptors[file] = _open_shard(place, file)
        where = {
            n: (descriptors[f], source.entry(n).offset, paths[f])
            for n, f in ((t.spec.name, source.file_of[t.spec.name]) for t in targets)
        }
        found = results(clean, targets, resources, allow_nonfinite=allow_nonfinite, write=where)
        wrong = [f"{n}: {found[n][1]}, not {expected[n]}" for n in found if found[n][1] != expected[n]]
        if wrong:
            raise IntegrityError(
                "results changed between computing and writing", "check the memory and the disk", wrong
            )
        for file, fd in descriptors.items():
            disk.sync_file(fd, paths[file], data_only=True)
    finally:
        for fd in descriptors.values():
            os.close(fd)


def _open_shard(place: StatePlace, file: str) -> int:
    with place.checkpoint.holder(busy_name(file)) as (folder, name):
        fd = folder.open_file(name, write=True)
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        raise IntegrityError(
            f"{folder.path / name}: has other names, and would change there too",
            "put a copy of the file in its place, and run the command again",
        )
    return fd


def commit(place: StatePlace, state: StackState) -> None:
    """Step 6: the new state is the state."""
    with place.made() as folder:
        folder.replace(STACK, text_of(state))


def finish(place: StatePlace, intent: Intent) -> None:
    """Step 7: names back, intent gone, garbage collected."""
    for shard in intent.shards:
        with place.checkpoint.holder(shard) as (folder, name):
            busy, usual = busy_name(name), folder.path / name
            if folder.kind(busy) is not None:
                if folder.kind(name) is not None:
                    raise IntegrityError(
                        f"{usual}: someone wrote it while {busy} was set aside",
                        f"keep one of the two under the name {name}, and drop the stack with --forget",
                    )
                folder.move(busy, name)
            elif folder.kind(name) is None:
                raise IntegrityError(f"{usual} is missing", "restore it from a copy")
    _sync_names(place, intent.shards)
    with place.made() as folder:
        folder.remove(INTENT, missing_ok=True)
        folder.sync()
    collect(place)


def recover(place: StatePlace, resources: Resources) -> str | None:
    """Finishes or undoes a change that was interrupted. The caller holds the exclusive lock.

    Returns:
        None when there was none, else a line that says what was done.

    Raises:
        IntegrityError: what is needed to go back is damaged; or the intent names what the checkpoint does not have.
        StorageError: there is no room to go back; the intent stays, and so do the names set aside.
    """
    intent = place.read_intent()
    if intent is None:
        return None
    state = place.read_stack()
    source = _source_of(place, intent, state)
    try:
        if state.sequence == intent.new.sequence:
            finish(place, intent)
            return f"{_FINISHED} after it was done"
        busy = [s for s in intent.shards if source.paths[s].name == busy_name(s.rpartition("/")[2])]
        if busy:
            try:
                _settle(place, source, state, state, intent, busy, resources)
            except IntegrityError as no_way_back:
                try:
                    _set_aside(place, [s for s in intent.shards if s not in busy])
                    source.close()
                    source = _source_of(place, intent, state)
                    _settle(place, source, intent.new, state, intent, intent.shards, resources)
                except IntegrityError:
                    raise no_way_back from None
                commit(place, intent.new)
                finish(place, intent)
                return f"{_FINISHED}: a patch that it takes off is damaged and cannot go on again"
        finish(place, intent)
        return "undid a change that was interrupted"
    finally:
        source.close()


def _source_of(place: StatePlace, intent: Intent, old: StackState) -> LocalSource:
    """The checkpoint with the shards that are set aside, which have all that the intent names.

    Raises:
        IntegrityError: lists what is not there.
    """
    anchor = place.checkpoint.path / place.anchor
    try:
        source = open_anchor(anchor, anchor, busy_name)
    except InputError as error:
        raise IntegrityError(
            f"{anchor}: an interrupted change of it can neither be undone nor finished", DROP, [str(error)]
        ) from error
    done = old.sequence == intent.new.sequence  # then nothing is computed any more
    known = {**intent.new.tensors, **old.tensors}
    wrong = [f"{file}: not a file of it" for file in intent.shards if file not in source.headers]
    wrong += [
        f"{name}: not a tensor that the change concerns"
        for name in intent.rewrite
        if not done and (name not in known or source.file_of.get(name) not in intent.shards)
    ]
    if wrong:
        source.close()
        raise IntegrityError(f"{place.path / INTENT}: names what {place.anchor} does not have", DROP, wrong)
    return source


def _settle(
    place: StatePlace,
    source: LocalSource,
    wanted: StackState,
    old: StackState,
    intent: Intent,
    shards: Sequence[str],
    resources: Resources,
) -> None:
    """Gives the tensors of some shards that are set aside what they are in a state, the old or the new one."""
    known = {**intent.new.tensors, **old.tensors}
    names = [n for n in intent.rewrite if source.file_of[n] in shards]
    clean = CleanSource(source, place, known)
    try:
        made = fit(clean, entries_of(place, wanted)).targets if wanted.patches else {}
        targets = [made.get(n) or Target(clean.specs[n], clean.specs[n], "sum", []) for n in names]
        for patch in {t.patch.id: t.patch for target in targets for t in target.terms}.values():
            patch.verify(resources)
        checked = results(clean, targets, resources, allow_nonfinite=True)
        damaged = [f"{n}: clean bytes" for n in names if checked[n][0] != known[n].clean]
        expected = {n: wanted.tensors[n].now if n in wanted.tensors else known[n].clean for n in names}
        damaged += [f"{n}: result" for n in names if checked[n][1] != expected[n]]
        if damaged:
            raise IntegrityError(
                f"{place.checkpoint.path}: cannot go back to before an interrupted change: kept bytes are damaged",
                "restore the checkpoint from a copy and drop the stack with --forget",
                damaged,
            )
        write_shards(place, source, clean, targets, expected, resources, allow_nonfinite=True)
    finally:
        clean.close()
