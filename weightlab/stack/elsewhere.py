"""Patches on a checkpoint's files that are recorded under another name than the one by which it was opened.

A record belongs to an anchor: a file or an index. The same bytes can be reached through another one: an index that came
beside a patched file, a second index with the same shard, a shard by itself when its index is gone, a folder of which
one module is patched, a link. Who took such bytes for clean would change them twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightlab.errors import IntegrityError
from weightlab.files.folder import open_folder
from weightlab.sources.local import LocalSource
from weightlab.stack.records import StackState
from weightlab.stack.state import FOLDER, places

_ABOVE = 3


@dataclass(frozen=True, slots=True)
class Found:
    """Patches on some of a checkpoint's files, recorded for another anchor."""

    anchor: Path
    state: StackState
    files: list[str]

    @property
    def line(self) -> str:
        return f"{', '.join(self.files)}: {len(self.state.patches)} patches are on, recorded for {self.anchor}"


def refuse_elsewhere(path: Path, source: LocalSource) -> None:
    """Checks that no patches are on a checkpoint's files but those that are recorded under its own name.

    Raises:
        IntegrityError: lists the files that have others, with the name under which those are recorded.
    """
    found = list(elsewhere(source))
    if found:
        raise patched_elsewhere(path, found)


def patched_elsewhere(path: Path, found: Sequence[Found]) -> IntegrityError:
    gone = [f.anchor for f in found if not f.anchor.is_file()]
    remedy = f"take them off there first: weightlab remove {found[0].anchor} --all"
    if gone:
        remedy = f"give {gone[0].name} back, or keep the files and drop the record: weightlab remove {gone[0]} --forget"
    return IntegrityError(f"{path}: it has patches on that went on under another name", remedy, [f.line for f in found])


def elsewhere(source: LocalSource) -> Iterator[Found]:
    """What is on a checkpoint's files and recorded for another anchor than its own."""
    own = os.path.realpath(source.folder)
    real = {os.path.realpath(source.folder / file): file for file in source.headers}
    digests = {header.digest: file for file, header in source.headers.items()}
    # Where a file itself lies, and the folders above: there it may be a part of a larger model.
    homes = {own, *(os.path.dirname(p) for p in real)}
    for _ in range(_ABOVE):
        homes |= {os.path.dirname(home) for home in homes}
    for home in sorted(homes):
        if not os.path.lexists(os.path.join(home, FOLDER)):
            continue
        with open_folder(Path(home)) as checkpoint:
            for place in places(checkpoint):
                if home == own and place.anchor == source.anchor:
                    continue
                state = place.read_stack()
                if not state.patches:
                    continue
                touched = {os.path.realpath(os.path.join(home, file)) for file in state.headers}
                files = sorted(real[p] for p in touched & real.keys())
                if not files and home == own and not place.has_anchor():  # or has it another name now?
                    files = sorted(digests[d] for d in set(state.headers.values()) & digests.keys())
                if files:
                    yield Found(Path(home) / place.anchor, state, files)
