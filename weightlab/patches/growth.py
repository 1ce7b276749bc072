"""What patches add to a checkpoint beside what they hold: zeros are so small that kilobytes can become terabytes."""

from __future__ import annotations

from weightlab.errors import MisfitError
from weightlab.patches.fit import Fit
from weightlab.patches.patch import Patch

FREE = 2**28
"""Bytes that any patch may add: many new rows that are all zero, for instance."""
RATIO = 64
"""Beyond that, so many bytes for each of its own."""


def require_proportion(fitted: Fit) -> None:
    """Checks that no patch makes a checkpoint larger out of proportion to its own bytes.

    Patches that are computed from what is there have no bytes of their own, and are no one else's: they may.

    Raises:
        MisfitError: lists the patches, with what they hold and what they add.
    """
    grown: dict[str, tuple[Patch, int]] = {}
    for target in fitted.targets.values():
        more = target.result.nbytes - (0 if target.mode == "add" else target.spec.nbytes)
        reshaped = target.mode == "add" or target.result.shape != target.spec.shape
        if more > 0 and reshaped:
            patch = target.terms[0].patch
            grown[patch.id] = patch, grown.get(patch.id, (patch, 0))[1] + more
    wrong = [
        f"{patch.label} has {patch.nbytes():,} bytes and adds {more:,}"
        for patch, more in grown.values()
        if patch.files and more > max(FREE, RATIO * patch.nbytes())
    ]
    if wrong:
        raise MisfitError(
            "a patch adds far more than it holds",
            "where that is meant, say --allow-growth (allow_growth=True), and see that the disk has room",
            wrong,
        )
