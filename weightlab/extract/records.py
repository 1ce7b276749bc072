"""The header of a difference, from what was found out about each tensor."""

from __future__ import annotations

from collections.abc import Mapping

from weightlab.extract.job import Job
from weightlab.extract.options import DiffOptions
from weightlab.patches.header import (
    REMOVED,
    SCHEMA,
    Base,
    Created,
    Errors,
    Part,
    PatchHeader,
    Record,
    Result,
    features_of,
)
from weightlab.sources import Source
from weightlab.version import __version__

# As long as any number and any digest can be: room for the header is kept before these are known.
OPEN_DIGEST = "f" * 64
_OPEN_ERRORS = Errors(max_abs=-1.2345678901234567e-300, relative_l2=-1.2345678901234567e-300)


def draft(job: Job) -> Record:
    """The record of a changed tensor before it is encoded, with the longest value of all that is still open."""
    lossless = job.choice.encoding.lossless
    return _record(job, None if lossless else _OPEN_ERRORS, OPEN_DIGEST, OPEN_DIGEST, {})


def final(job: Job, parts: Mapping[str, Part], *, base_known: bool) -> Record:
    """The record of a changed tensor that was encoded.

    Raises:
        RangeError: its error is infinite.
    """
    errors = None if job.choice.encoding.lossless else job.errors()
    return _record(job, errors, job.base_digest if base_known else None, job.tuned_digest, parts)


def _record(
    job: Job, errors: Errors | None, base_digest: str | None, tuned_digest: str | None, parts: Mapping[str, Part]
) -> Record:
    spec, base = job.pair.spec, job.pair.base_spec
    assert job.plan is not None
    return Record(
        encoding=job.choice.name,
        dtype=spec.dtype,
        shape=list(spec.shape),
        parts=dict(parts),
        base_dtype=base.dtype if base is not None and base.dtype != spec.dtype else None,
        base_shape=list(base.shape) if base is not None and base.shape != spec.shape else None,
        added=base is None,
        base_digest=base_digest if base is not None else None,
        result_digest=tuned_digest if job.choice.encoding.lossless else None,
        error=errors,
        parameters=job.plan.parameters | ({"instead_of": job.choice.fallback} if job.choice.fallback else {}),
    )


def removed(base: Source, name: str, digest: str | None) -> Record:
    """The record of a tensor that the patch takes away."""
    spec = base.specs[name]
    return Record(encoding=REMOVED, dtype=spec.dtype, shape=list(spec.shape), parts={}, base_digest=digest)


def header(
    records: Mapping[str, Record], base_fingerprint: str | None, result_fingerprint: str | None, options: DiffOptions
) -> PatchHeader:
    """The header of the whole patch."""
    return PatchHeader(
        schema=SCHEMA,
        requires=sorted(features_of(records)),
        kind=options.kind,
        method=options.method,
        base=Base(name=options.base_name, revision=options.revision, fingerprint=base_fingerprint),
        result=Result(fingerprint=result_fingerprint) if result_fingerprint else None,
        tensors=dict(records),
        license=options.license,
        created=Created(tool="weightlab", version=__version__),
        notes=options.notes,
    )
