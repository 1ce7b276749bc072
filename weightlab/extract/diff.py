"""The difference of two checkpoints as a patch.

Passes over the data: one to find the tensors that did not change (it stops at a tensor's first difference), one or
more by encodings that need a statistic or a factorisation, and one that encodes, digests and measures the error.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.encodings import Plan
from weightlab.errors import NonFiniteError
from weightlab.extract.pair import PairDelta, TensorPair
from weightlab.extract.rules import Choice, EncodeRules, Rules
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder, refuse_existing
from weightlab.files.digest import Turns, fingerprint, tensor_hasher
from weightlab.patches.compute import digest_tensors
from weightlab.patches.header import SCHEMA, Base, Created, Errors, Kind, Method, PatchHeader, Record, Result
from weightlab.patches.layout import StoredTensor
from weightlab.patches.parts import StoredParts
from weightlab.patches.patch import Patch, open_patch
from weightlab.patches.ties import redundant_copy_of
from weightlab.patches.writer import PatchWriter, Spool, TensorSpool
from weightlab.sources import Source
from weightlab.stream.executor import Progress, Resources, Workspace, run
from weightlab.tensors.match import Pairing, pair
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import select
from weightlab.tensors.tiles import tiles
from weightlab.version import __version__

_OPEN_ERROR = Errors(max_abs=-1.2345678901234567e-300, relative_l2=-1.2345678901234567e-300)
_OPEN_DIGEST = "f" * 64


@dataclass(slots=True)
class _Measured:
    """What a tensor's tiles add up to."""

    base_digest: Any = None
    tuned_digest: Any = None
    max_abs: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0


@dataclass(slots=True)
class _Job:
    pair: TensorPair
    choice: Choice
    plan: Plan | None = None
    changed: bool = False
    parts: StoredParts | None = None
    measured: _Measured = field(default_factory=_Measured)


@dataclass(slots=True)
class DiffOptions:
    """How a difference is taken.

    Attributes:
        encode: see `Rules`.
        include, exclude: globs over tensor names.
        allow: what may differ in structure: "added", "removed" tensors, appended "rows".
        allow_nonfinite: take NaN and infinities as they are.
        kind, method: what the header says the patch is.
        base_known: False: the base's own bytes mean nothing (a sum of patches), so none of its digests are recorded,
            only `base_fingerprint`.
    """

    encode: EncodeRules = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    allow: Collection[str] = ()
    allow_nonfinite: bool = False
    kind: Kind = "diff"
    method: Method = field(default_factory=lambda: Method(name="diff"))
    base_known: bool = True
    base_fingerprint: str | None = None
    base_name: str | None = None
    revision: str | None = None
    license: str | None = None
    notes: str | None = None
    resources: Resources = field(default_factory=Resources)


def diff_sources(base: Source, tuned: Source, out: Path | None, options: DiffOptions) -> Patch:
    """Takes `tuned` − `base` and writes it as a patch.

    Args:
        out: `NAME.safetensors` for one file, any other name for a folder that is sharded at 5 GB; None for temporary
            storage that lasts as long as the returned object.

    Raises:
        NamesMismatchError: the checkpoints do not pair up; all misfits are listed.
        NonFiniteError: lists the tensors with NaN or infinity.
    """
    if out is not None:
        refuse_existing(out)
    rules = Rules(options.encode)
    pairing = match_sources(base, tuned, options.allow)
    chosen = select([*pairing.both, *pairing.added, *pairing.removed], options.include, options.exclude)
    rules.check_used(chosen)
    jobs = [
        _job(base, tuned, name, name not in pairing.added, rules, options)
        for name in sorted(chosen, key=natural_key)
        if name not in pairing.removed
    ]
    _find_changed(jobs, options.resources)
    whole = not options.include and not options.exclude
    with ExitStack() as stack:
        if out is None:
            home = Path(tempfile.mkdtemp(prefix="weightlab-"))
            place, sharded = home / "patch.safetensors", False
        elif out.name.endswith(".safetensors"):
            place, sharded = stack.enter_context(atomic_file(out)), False
        else:
            place, sharded = stack.enter_context(atomic_folder(out)), True
        _write(place, sharded, jobs, [n for n in chosen if n in pairing.removed], base, whole, options)
    return open_patch(home if out is None else out, temporary=out is None)


def match_sources(base: Source, tuned: Source, allow: Collection[str]) -> Pairing:
    """Pairs two checkpoints by name; a redundant copy of a tied tensor in only one of them is no difference."""
    base_specs, tuned_specs = dict(base.specs), dict(tuned.specs)
    for mine, other, specs in ((base, tuned, base_specs), (tuned, base, tuned_specs)):
        for name in [n for n in specs if n not in other.specs]:
            if redundant_copy_of(mine, name, [n for n in mine.specs if n in other.specs]):
                del specs[name]
    return pair(base_specs, tuned_specs, base_label=base.label, tuned_label=tuned.label, allow=allow)


def _job(base: Source, tuned: Source, name: str, in_base: bool, rules: Rules, options: DiffOptions) -> _Job:
    opaque = name in base.opaque or name in tuned.opaque
    spec = base.specs[name] if in_base else tuned.specs[name]
    choice = rules.choose(spec, opaque=opaque, values=not in_base)
    made = TensorPair(
        base,
        name if in_base else None,
        tuned,
        name,
        lossless=choice.encoding.lossless,
        opaque=opaque,
        allow_nonfinite=options.allow_nonfinite,
    )
    return _Job(made, choice)


def _find_changed(jobs: Sequence[_Job], resources: Resources) -> None:
    def compare(job: _Job, workspace: Workspace) -> None:
        spec, base = job.pair.tuned_spec, job.pair.base_spec
        if base is None or base.shape != spec.shape or base.dtype != spec.dtype:
            job.changed = True
            return
        for start, stop in tiles(spec.stored.numel):
            before, after = job.pair.raw(start, stop, workspace)
            if not torch.equal(before, after):
                job.changed = True
                return

    run(jobs, compare, resources)


def _write(
    place: Path,
    sharded: bool,
    jobs: Sequence[_Job],
    removed: Sequence[str],
    base: Source,
    whole: bool,
    options: DiffOptions,
) -> None:
    changed = [job for job in jobs if job.changed]
    folder = place if sharded else place.parent
    spool = Spool(folder)
    writer: PatchWriter | None = None
    try:
        _prepare(changed, spool, options)
        stored = {job.pair.name: _stored(job) for job in changed}
        records = {job.pair.name: _record(job, draft=True) for job in changed}
        records |= {name: _removed(base, name, _OPEN_DIGEST) for name in removed}
        writer = PatchWriter(place, stored, _header(records, _OPEN_DIGEST, _OPEN_DIGEST, options), sharded=sharded)
        disk.require_room(folder, writer.most_bytes(), writer.largest_file())
        writer.begin()
        for job in changed:
            _write_ready_parts(job, writer, spool)
        digests = _encode(jobs, writer, options)
        digests_removed = digest_tensors(base, removed, options.resources)
        forgotten = {} if options.base_known else {"base_digest": None}
        records = {
            job.pair.name: _record(job, draft=False).model_copy(
                update={"parts": writer.part_records(job.pair.name), **forgotten}
            )
            for job in changed
        }
        records |= {name: _removed(base, name, digests_removed[name]) for name in removed}
        exact = whole and all(job.choice.encoding.lossless for job in changed)
        before = {n: d for n, (d, _) in digests.items() if d is not None} | digests_removed
        after = {n: d for n, (_, d) in digests.items()}
        if whole:  # redundant copies of tied tensors belong to a checkpoint's fingerprint too
            before |= digest_tensors(base, [n for n in base.specs if n not in before], options.resources)
        if exact:
            tuned = jobs[0].pair.tuned if jobs else base
            after |= digest_tensors(tuned, [n for n in tuned.specs if n not in after], options.resources)
        writer.finish(
            _header(
                records,
                fingerprint(before) if whole and options.base_known else options.base_fingerprint,
                fingerprint(after) if exact else None,
                options,
            )
        )
    finally:
        spool.close()
        if writer is not None:
            writer.close()


def _prepare(jobs: Sequence[_Job], spool: Spool, options: DiffOptions) -> None:
    bad: set[str] = set()

    def prepare(job: _Job, workspace: Workspace) -> None:
        if job.choice.name == "low_rank":
            options.resources.require_matrix(job.pair.spec.numel, job.pair.name)
        parameters = job.choice.parameters
        try:
            job.plan = job.choice.encoding.prepare(
                PairDelta(job.pair, workspace), parameters, TensorSpool(spool, job.pair.name)
            )
        except NonFiniteError as error:
            bad.update(error.offenders)

    run(jobs, prepare, options.resources)
    _raise_nonfinite(bad)


def _raise_nonfinite(bad: set[str]) -> None:
    if bad:
        raise NonFiniteError(
            f"NaN or infinity in {len(bad)} tensors", "mend them, exclude them, or pass --allow-nonfinite", sorted(bad)
        )


def _stored(job: _Job) -> StoredTensor:
    assert job.plan is not None
    return StoredTensor(dict(job.plan.parts), job.plan.growing)


def _write_ready_parts(job: _Job, writer: PatchWriter, spool: Spool) -> None:
    plan = job.plan
    assert plan is not None
    for part, values in plan.small.items():
        writer.append(job.pair.name, part, values)
    if plan.spooled:
        writer.take(job.pair.name, [p for p in plan.parts if p not in plan.small], spool)
        job.parts = writer.parts(job.pair.name, job.pair.spec, plan.parameters)


def _encode(jobs: Sequence[_Job], writer: PatchWriter, options: DiffOptions) -> dict[str, tuple[str | None, str]]:
    """Encodes every changed tensor and digests every tensor of both checkpoints: {name: (base, tuned)}."""
    turns = Turns()
    bad: set[str] = set()
    total = sum(job.pair.tuned_spec.nbytes + (job.pair.base_spec.nbytes if job.pair.base_spec else 0) for job in jobs)
    progress = Progress(total, options.resources.progress)

    def tasks() -> Iterator[tuple[int, _Job, int, int]]:
        index = 0
        for job in jobs:
            base, tuned = job.pair.base_spec, job.pair.tuned_spec
            job.measured.tuned_digest = tensor_hasher(tuned.dtype, tuned.shape)
            if base is not None:
                job.measured.base_digest = tensor_hasher(base.dtype, base.shape)
            for start, stop in tiles(tuned.stored.numel):
                yield index, job, start, stop
                index += 1

    def work(task: tuple[int, _Job, int, int], workspace: Workspace) -> None:
        index, job, start, stop = task
        base, tuned = job.pair.raw(start, stop, workspace)
        pieces: dict[str, Tensor] = {}
        errors = (0.0, 0.0, 0.0)
        if job.changed and job.plan is not None:
            try:
                tile = job.pair.tile(start, stop, base, tuned, workspace)
                pieces, approx = job.choice.encoding.encode(job.plan, job.pair.spec, tile)
                if job.parts is not None:
                    approx = workspace.buffer("approx", stop - start, tile.delta.dtype)
                    job.choice.encoding.decode(job.parts, start, stop, tile.base, approx, workspace)
                if approx is not None:
                    errors = _errors(tile.delta, approx, workspace.buffer("error", stop - start, tile.delta.dtype))
            except NonFiniteError as error:
                bad.update(error.offenders)
        with turns.turn(index):
            measured = job.measured
            if measured.base_digest is not None:
                measured.base_digest.update(base.numpy().data)
            measured.tuned_digest.update(tuned.numpy().data)
            for part, values in pieces.items():
                writer.append(job.pair.name, part, values)
            measured.max_abs = max(measured.max_abs, errors[0])
            measured.squared_error += errors[1]
            measured.squared_norm += errors[2]
        progress.advance(base.numel() + tuned.numel())

    run(tasks(), work, options.resources, turns)
    _raise_nonfinite(bad)
    return {
        job.pair.name: (
            job.measured.base_digest.hexdigest() if job.measured.base_digest is not None else None,
            job.measured.tuned_digest.hexdigest(),
        )
        for job in jobs
    }


def _errors(delta: Tensor, approx: Tensor, work: Tensor) -> tuple[float, float, float]:
    """(largest |error|, sum of squared errors, sum of squared delta); sums in fp64, block by block."""
    norm = float(torch.dot(delta, delta)) if delta.dtype == torch.float64 else _squares(delta)
    torch.sub(approx, delta, out=work)  # not in place: what is stored may share memory with either
    low, high = (float(v) for v in torch.aminmax(work))
    return max(-low, high), _squares(work), norm


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _record(job: _Job, *, draft: bool) -> Record:
    pair_, plan, measured = job.pair, job.plan, job.measured
    assert plan is not None
    base, lossless = pair_.base_spec, job.choice.encoding.lossless
    error = None
    if not lossless:
        relative = math.sqrt(measured.squared_error / measured.squared_norm) if measured.squared_norm else 0.0
        error = _OPEN_ERROR if draft else Errors(max_abs=measured.max_abs, relative_l2=relative)
    return Record(
        encoding=job.choice.name,
        dtype=pair_.spec.dtype,
        shape=list(pair_.spec.shape),
        parts={},
        base_dtype=base.dtype if base is not None and base.dtype != pair_.spec.dtype else None,
        base_shape=list(base.shape) if base is not None and base.shape != pair_.spec.shape else None,
        added=base is None,
        base_digest=None if base is None else (_OPEN_DIGEST if draft else measured.base_digest.hexdigest()),
        result_digest=None if not lossless else (_OPEN_DIGEST if draft else measured.tuned_digest.hexdigest()),
        error=error,
        parameters=plan.parameters | ({"instead_of": job.choice.fallback} if job.choice.fallback else {}),
    )


def _removed(base: Source, name: str, digest: str) -> Record:
    spec = base.specs[name]
    return Record(encoding="removed", dtype=spec.dtype, shape=list(spec.shape), parts={}, base_digest=digest)


def _header(
    records: Mapping[str, Record], base_fingerprint: str | None, result_fingerprint: str | None, options: DiffOptions
) -> PatchHeader:
    requires = set()
    for record in records.values():
        requires |= {"added"} if record.added else set()
        requires |= {"removed"} if record.encoding == "removed" else set()
        requires |= {"rows"} if record.base_shape is not None else set()
        requires |= {"dtype"} if record.base_dtype is not None else set()
    return PatchHeader(
        schema=SCHEMA,
        requires=sorted(requires),
        kind=options.kind,
        method=options.method,
        base=Base(name=options.base_name, revision=options.revision, fingerprint=base_fingerprint),
        result=Result(fingerprint=result_fingerprint) if result_fingerprint else None,
        tensors=dict(records),
        license=options.license,
        created=Created(tool="weightlab", version=__version__),
        notes=options.notes,
    )
