"""What an operation reports."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from weightlab.ops.companions import stale_weights
from weightlab.sources import open_source
from weightlab.sources.local import LocalSource
from weightlab.stack.transaction import Changed


@dataclass(frozen=True, slots=True)
class PatchOnInfo:
    """A patch that is on: its id, what its file was called, and its scale."""

    id: str
    name: str
    scale: float


@dataclass(slots=True)
class Outcome:
    """What was done, or in a dry run would be.

    Attributes:
        model: the checkpoint that was read or changed.
        out: the new checkpoint; None for a change in place.
        patches: what is on it afterwards, in the order of the ids.
        tensors: how many tensors were computed anew.
        bytes_written: tensor bytes computed and written, kept clean bytes included.
        bytes_copied: bytes copied as they are.
        left_out: files beside the model that were not copied because they hold other weights.
        notes: what the user should know.
    """

    model: str
    out: str | None = None
    patches: list[PatchOnInfo] = field(default_factory=list)
    tensors: int = 0
    bytes_written: int = 0
    bytes_copied: int = 0
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False


@dataclass(slots=True)
class Status:
    """What is on a checkpoint.

    Attributes:
        tensors: how many tensors the patches touch.
        kept_bytes: size of the clean bytes that are kept.
        intact: whether the files are as weightlab left them.
        notes: what was recovered, or what is wrong.
    """

    model: str
    patches: list[PatchOnInfo] = field(default_factory=list)
    tensors: int = 0
    kept_bytes: int = 0
    intact: bool = True
    notes: list[str] = field(default_factory=list)


def outcome_of(model: str | os.PathLike[str], changed: Changed, dry_run: bool) -> Outcome:
    """The report on a change in place; names the files that hold the weights once more and stay as they were."""
    path = Path(model)
    stale: list[str] = []
    if changed.tensors and changed.state.patches and path.is_dir():
        source = open_source(path)
        source.close()
        stale = stale_weights(path, source.files if isinstance(source, LocalSource) else ())
    return Outcome(
        os.fspath(model),
        patches=[PatchOnInfo(p.id, p.name, p.scale) for p in changed.state.patches],
        tensors=changed.tensors,
        bytes_written=changed.bytes_written,
        notes=changed.notes + [f"not changed: {name}, which holds weights without the patches" for name in stale],
        dry_run=dry_run,
    )
