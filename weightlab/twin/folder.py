"""The folder of a twin: the shared part, an exclusive part for each expert, a router; and what says that they belong.

twin.json
shared/                   a patch on the base
experts/NAME/exclusive/   a patch on the shared model: the base with `shared` on
experts/NAME/*.json       the expert's configuration, where it has one
router.json, router.safetensors
*                         configuration and tokenizer of the base, byte for byte

All of it may be a stranger's: names of experts become paths only when they are plain ones, and no link in the folder is
followed.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError
from weightlab.files.foreign import plain_names, read_json
from weightlab.patches.patch import Patch, open_patch

SCHEMA = 1
HEADER = "twin.json"
SHARED, EXPERTS, EXCLUSIVE = "shared", "experts", "exclusive"
ROUTER = "router.json"
CONFIGURATION = ("config.json", "generation_config.json", "preprocessor_config.json")
"""Of an expert, kept beside its part where it has them; labels are in the first."""
NOT_IN_NAMES = frozenset("/\\:\0,=")
"""What the name of an expert is without."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ExpertHeader(_Strict):
    """One expert.

    Attributes:
        patch: the id of its exclusive part.
        heads: tensors that it brings along because not all experts have them, or not in one shape.
    """

    name: Annotated[str, Field(min_length=1)]
    patch: str
    heads: list[str]


class TwinHeader(_Strict):
    """What twin.json says.

    Attributes:
        base: `name` on the Hub, if it has one; `revision`; `fingerprint` of its tensors; `path`: from here to where it
            was.
        method: how the shared part was made, with parameters.
        compress: how the exclusive parts are stored.
        shared: the id of the shared part.
        result: the fingerprint of the shared model, which the exclusive parts go on.
        left_out: tensors of the base that no expert has, or that are copies of tied ones.
        kept: tensors of integers that experts have otherwise, or beyond the base; the base's stay.
    """

    schema_version: int
    base: dict[str, str | None]
    method: dict[str, Any]
    compress: str
    shared: str
    result: str
    experts: list[ExpertHeader]
    left_out: list[str] = []
    kept: list[str] = []


class Twin:
    """A twin on disk, opened: headers are checked, data is not read.

    Attributes:
        path: the folder.
        header: what twin.json says.
        shared: the patch that goes on the base.
        exclusive: {expert: the patch that goes on the shared model}.
    """

    def __init__(self, path: Path, header: TwinHeader, shared: Patch, exclusive: dict[str, Patch]) -> None:
        self.path, self.header, self.shared, self.exclusive = path, header, shared, exclusive

    @property
    def names(self) -> list[str]:
        """The experts, in the order that weights are given in."""
        return list(self.exclusive)

    def heads(self, name: str) -> list[str]:
        """The tensors that this expert has for itself."""
        return next(expert.heads for expert in self.header.experts if expert.name == name)

    def sizes(self) -> dict[str, int]:
        """Bytes of the shared part, `shared`, and of each exclusive part, by the expert's name."""
        return {SHARED: self.shared.nbytes(), **{name: patch.nbytes() for name, patch in self.exclusive.items()}}


def open_twin(path: Path) -> Twin:
    """Opens the folder.

    Raises:
        MissingInputError: it is no twin, or parts are missing; all are listed.
        MalformedFileError: twin.json breaks the format.
        IntegrityError: a part is another than the one that was written with it.
    """
    file = path / HEADER
    if not file.is_file():
        raise MissingInputError(f"{path}: no twin (there is no {HEADER})", "make one with `weightlab twin split`")
    header = read_json(file, TwinHeader, follow=False)
    if header.schema_version != SCHEMA:
        raise MalformedFileError(f"{file}: version {header.schema_version} is not known here", "update weightlab")
    _require_names(header, file)
    _require_no_links(path)
    # By folder, not by name: an expert may have any name that a folder can have.
    wanted = {SHARED: header.shared} | {f"{EXPERTS}/{e.name}/{EXCLUSIVE}": e.patch for e in header.experts}
    missing = [place for place in wanted if not (path / place).exists()]
    if missing:
        raise MissingInputError(
            f"{path}: parts of it are missing", "copy them too, or split again with the experts that there are", missing
        )
    patches = {place: open_patch(path / place) for place in wanted}
    wrong = [
        f"{place}: {p.id} is there, {wanted[place]} belongs" for place, p in patches.items() if p.id != wanted[place]
    ]
    if wrong:
        raise IntegrityError(f"{path}: parts of another twin", "copy the folder as a whole", wrong)
    shared, *exclusive = patches.values()
    lacking = [
        f"{e.name}: {head}"
        for e, p in zip(header.experts, exclusive, strict=True)
        for head in e.heads
        if head not in p.records or p.records[head].encoding == "removed"
    ]
    if lacking:
        raise MalformedFileError(f"{file}: experts lack tensors of their own", "make the twin again", lacking)
    return Twin(path, header, shared, {e.name: p for e, p in zip(header.experts, exclusive, strict=True)})


def no_expert_names(names: list[str]) -> list[str]:
    """Those that no expert can have: they become names of folders, and are read in lists."""
    return [name for name in names if not name or name[0] == "." or NOT_IN_NAMES & set(name) or name == SHARED]


def _require_names(header: TwinHeader, file: Path) -> None:
    """Raises:
    MalformedFileError: names of experts that are no plain ones, or are there twice; or there is no fingerprint.
    """
    names = plain_names((expert.name for expert in header.experts), f"{file}: the names of experts")
    wrong = [repr(name) for name in no_expert_names(names)]
    wrong += [f"{name!r} twice" for name, count in Counter(names).items() if count > 1]
    if wrong or not names:
        raise MalformedFileError(f"{file}: these are no names for experts", "make the twin again", wrong)
    if not header.base.get("fingerprint"):
        raise MalformedFileError(f"{file}: it does not say which base it is for", "make the twin again")


def _require_no_links(path: Path) -> None:
    """Raises:
    MalformedFileError: lists what in the folder is neither a file nor a folder.
    """
    wrong = [str(place.relative_to(path)) for place in _entries(path) if _is_other(place)]
    if wrong:
        raise MalformedFileError(
            f"{path}: in a twin are files and folders, no links and nothing else", "copy it with `cp -RL`", wrong
        )


def _entries(path: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(path):  # which follows no links
        yield from (Path(place) / name for name in sorted((*folders, *files)))


def _is_other(place: Path) -> bool:
    mode = place.lstat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
