"""Patches on a checkpoint's files that are recorded under another name than the one by which it was opened.

A record belongs to an anchor: a file or an index. The same bytes can be reached through another one: an index that came
beside a patched file, a second index with the same shard, a shard by itself when its index is gone, a folder of which
one module is patched, a link or a second name. Who took such bytes for clean would change them twice.
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
    """Patches on some of a checkpoint's files, recorded for another anchor.

    `gone`: the anchor, or recorded files, that are not there under their names any more.
    """

    anchor: Path
    state: StackState
    files: list[str]
    gone: list[str]

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
    remedy = f"take them off there first: weightlab remove {found[0].anchor} --all"
    for f in found:
        if f.gone:
            names = ", ".join(f.gone)
            remedy = f"give {names} back, or keep the files and drop the record: weightlab remove {f.anchor} --forget"
            break
    return IntegrityError(f"{path}: it has patches on that went on under another name", remedy, [f.line for f in found])


def elsewhere(source: LocalSource) -> Iterator[Found]:
    """What is on a checkpoint's files and recorded for another anchor than its own."""
    own = os.path.realpath(source.folder)
    mine: dict[tuple[int, int], str] = {}
    homes = {own}
    for file in source.headers:
        path = os.path.join(source.folder, file)
        if (found := _identity(path)) is not None:
            mine[found] = file
        homes.add(os.path.dirname(os.path.realpath(path)))
    digests = {header.digest: file for file, header in source.headers.items()}
    # Where a file itself lies, and the folders above: there it may be a part of a larger model.
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
                there = {file: _identity(os.path.join(home, file)) for file in state.headers}
                files = sorted({mine[i] for i in there.values() if i in mine})
                gone = [file for file, i in there.items() if i is None]
                if home == own and not files:  # or have they other names now?
                    lost = {state.headers[file] for file in (gone if place.has_anchor() else there)}
                    files = sorted(digests[d] for d in lost & digests.keys())
                if files:
                    gone = gone if place.has_anchor() else [place.anchor]
                    yield Found(Path(home) / place.anchor, state, files, gone)


def _identity(path: str) -> tuple[int, int] | None:
    """What stays the same under all names of a file; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
