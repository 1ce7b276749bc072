"""How two models differ, without making a patch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

from weightlab.extract.match import aligned, match_sources, renamed
from weightlab.ops.inspect import Inspection, row_of, summarise
from weightlab.ops.moments import moments
from weightlab.ops.operands import ModelLike, reading
from weightlab.patches.compute import digest_tensors
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.stream.executor import Resources
from weightlab.tensors.naming import Renames
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import patterns


def difference(
    base: ModelLike,
    tuned: ModelLike,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    allow: Collection[str] = (),
    key: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Inspection:
    """The tensors that differ, with the norms of the difference, absolute and relative to the base.

    `tensors` has a row for each tensor that is not the same bit for bit, without norms where it has no arithmetic or
    grows; `facts` has how many were compared and changed, and the names that come and go.

    Raises:
        NamesMismatchError: lists every tensor that does not pair up and is not allowed to.
    """
    include, exclude = patterns(include), patterns(exclude)
    resources = resources or Resources()
    with ExitStack() as stack:
        before: Source = stack.enter_context(reading(base, key=key, wait=wait))
        after: Source = stack.enter_context(reading(tuned, key=key, wait=wait))
        after, taken = renamed(before, after, renames)
        before, after = aligned(before, after)
        pairing = match_sources(before, after, allow, include, exclude)
        both = pairing.both
        digests = [digest_tensors(s, both, resources) for s in (before, after)]
        changed = sorted((n for n in both if digests[0][n] != digests[1][n]), key=natural_key)
        plain = [
            n
            for n in changed
            if before.specs[n].shape == after.specs[n].shape
            and before.specs[n].is_float
            and n not in before.opaque | after.opaque
        ]
        found = moments(DifferenceSource(before, after, plain), plain, resources)
        weights = moments(before, plain, resources)
        rows = [row_of(before.specs[n], before.specs[n].nbytes, found.get(n)) for n in changed]
        for row in rows:
            if row.name in weights and weights[row.name].norm:
                row.relative = found[row.name].norm / weights[row.name].norm
        result = summarise(
            f"{after.label} against {before.label}", "difference", rows, sum(r.bytes for r in rows), found, weights
        )
        result.facts = {
            "compared": len(both),
            "changed": len(changed),
            "added": sorted(pairing.added, key=natural_key),
            "removed": sorted(pairing.removed, key=natural_key),
            **({"renames": taken} if taken else {}),
        }
        return result
