"""The passes over the data of a difference: what changed, what encodings need to know first, and the encoding itself.

The first pass stops at a tensor's first difference. The last encodes, writes, takes digests and measures the error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from weightlab.errors import NonFiniteError, RangeError
from weightlab.extract.faults import Faults
from weightlab.extract.job import Distance, Job, distance
from weightlab.extract.pair import PairDelta
from weightlab.extract.rules import Rules
from weightlab.files.digest import Turns
from weightlab.patches.writer import PatchWriter, Spool, TensorSpool
from weightlab.stream.executor import Progress, Resources, run
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace


def find_changed(jobs: Sequence[Job], resources: Resources) -> None:
    """Sets `changed`. Bytes count, but what is stored as a difference has changed only where that is not zero."""

    def compare(job: Job, workspace: Workspace) -> None:
        pair = job.pair
        if pair.base_spec is None or pair.base_spec.shape != pair.tuned_spec.shape:
            job.changed = True
            return
        if job.choice.encoding.lossless and pair.base_spec.dtype != pair.tuned_spec.dtype:
            job.changed = True
            return
        for start, stop in tiles(pair.tuned_spec.stored.numel):
            try:
                base, tuned = pair.raw(start, stop, workspace)
                if torch.equal(base, tuned) and pair.base_spec.dtype == pair.tuned_spec.dtype:
                    continue
                if not job.choice.encoding.lossless:
                    job.changed = bool(pair.tile(start, stop, base, tuned, workspace).delta.any())
                else:
                    job.changed = True
            except (NonFiniteError, RangeError):  # found again, and gathered, by the later passes
                job.changed = True
            if job.changed:
                return

    run(jobs, compare, resources)


def prepare(jobs: Sequence[Job], rules: Rules, spool: Spool, faults: Faults, resources: Resources) -> None:
    """Plans every changed tensor.

    Raises:
        NonFiniteError, RangeError: lists every tensor that cannot be stored.
    """

    matrices = resources.room_for_matrices()

    def plan(job: Job, workspace: Workspace) -> None:
        delta, room = PairDelta(job.pair, workspace, resources, matrices), TensorSpool(spool, job.pair.name)
        with faults.gathered():
            job.plan = job.choice.encoding.prepare(delta, job.choice.parameters, room)
            if job.plan is None:
                job.choice = rules.dense_instead_of(job.choice)
                job.plan = job.choice.encoding.prepare(delta, job.choice.parameters, room)
        if delta.was_whole:
            _give_back_memory()

    run(jobs, plan, resources)
    if faults:  # name those too that only encoding would have found
        run(jobs, lambda job, workspace: _check(job, faults, workspace), resources)
        faults.raise_any()


def _give_back_memory() -> None:
    """Returns freed memory to the system: glibc would keep the pieces of each matrix and take more for the next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no such habit
    if trim is not None:
        trim(0)


def _check(job: Job, faults: Faults, workspace: Workspace) -> None:
    for start, stop in tiles(job.pair.tuned_spec.stored.numel):
        with faults.gathered():
            tile = job.pair.tile(start, stop, *job.pair.raw(start, stop, workspace), workspace)
            if job.plan is not None and not job.choice.encoding.lossless:
                job.choice.encoding.encode(job.plan, job.pair.spec, tile)


def write_ready_parts(job: Job, writer: PatchWriter, spool: Spool) -> None:
    """Writes what `prepare` finished."""
    plan = job.plan
    assert plan is not None
    for part, values in plan.small.items():
        writer.append(job.pair.name, part, values)
    if plan.spooled:
        writer.take(job.pair.name, [p for p in plan.parts if p not in plan.small], spool)
        job.parts = writer.parts(job.pair.name, job.pair.spec, plan.parameters)


def encode(jobs: Sequence[Job], writer: PatchWriter, faults: Faults, resources: Resources) -> None:
    """Encodes every changed tensor and takes the digests of all `jobs`.

    Raises:
        NonFiniteError, RangeError: lists every tensor that cannot be stored.
    """
    turns = Turns()
    total = sum(job.pair.tuned_spec.nbytes + (job.pair.base_spec.nbytes if job.pair.base_spec else 0) for job in jobs)
    progress = Progress(total, resources.progress)

    def tasks() -> Iterator[tuple[int, Job, int, int]]:
        index = 0
        for job in jobs:
            for start, stop in tiles(job.pair.tuned_spec.stored.numel):
                yield index, job, start, stop
                index += 1

    def work(task: tuple[int, Job, int, int], workspace: Workspace) -> None:
        index, job, start, stop = task
        base = tuned = workspace.buffer("nothing", 0, torch.uint8)
        pieces: dict[str, Tensor] = {}
        measured = Distance()
        with faults.gathered():
            base, tuned = job.pair.raw(start, stop, workspace)
            if job.changed:
                pieces, measured = _encoded(job, start, stop, base, tuned, workspace)
        with turns.turn(index):
            last = stop == job.pair.tuned_spec.stored.numel
            job.take(base, tuned, last=last)
            writes = [writer.reserve(job.pair.name, part, values) for part, values in pieces.items()]
            job.distance = job.distance.joined(measured)
            if last and job.parts is not None:
                job.parts.release()
            if last and job.changed and not faults:
                writer.part_records(job.pair.name)
        for write in writes:
            write()
        progress.advance(base.numel() + tuned.numel())

    run(tasks(), work, resources, turns)
    faults.raise_any()
    nothing = torch.empty(0, dtype=torch.uint8)
    for job in jobs:
        if not job.pair.tuned_spec.stored.numel:  # it has no tile
            job.take(nothing, nothing, last=True)


def _encoded(
    job: Job, start: int, stop: int, base: Tensor, tuned: Tensor, workspace: Workspace
) -> tuple[dict[str, Tensor], Distance]:
    assert job.plan is not None
    encoding = job.choice.encoding
    tile = job.pair.tile(start, stop, base, tuned, workspace)
    pieces, decoded = encoding.encode(job.plan, job.pair.spec, tile)
    if job.parts is not None:
        decoded = workspace.buffer("decoded", stop - start, tile.delta.dtype)
        encoding.decode(job.parts, start, stop, tile.base, decoded, workspace)
    if decoded is None:
        return pieces, Distance()
    return pieces, distance(tile.delta, decoded, workspace.buffer("error", stop - start, tile.delta.dtype))
