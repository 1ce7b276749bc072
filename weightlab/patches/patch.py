"""A patch that lies in a file or folder, opened: header, parts, checks."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightlab.encodings import ENCODINGS, Encoding
from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError, UsageError
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder
from weightlab.files.container import read_header
from weightlab.patches.header import KEY, REMOVED, SCHEMA, Base, Method, PatchHeader, Record, parse_header
from weightlab.patches.layout import INDEX_NAME, shard_name
from weightlab.patches.opening import check_entries, files_of, joined
from weightlab.patches.parts import Extent, StoredParts
from weightlab.patches.saving import copy_files
from weightlab.stream.executor import Resources, run
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.spec import DTYPES
from weightlab.tensors.workspace import Workspace


class PatchFiles:
    """The open files of a patch, closed when the last patch object that uses them is gone."""

    def __init__(self, paths: Mapping[str, Path], temporary: Path | None = None) -> None:
        self.paths = dict(paths)
        self.descriptors: dict[str, int] = {}
        weakref.finalize(self, _close, self.descriptors, temporary)
        for name, path in paths.items():
            with disk.storage_errors(path):
                self.descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(descriptors: Mapping[str, int], temporary: Path | None) -> None:
    for fd in descriptors.values():
        os.close(fd)
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)  # a temporary folder at exit: nothing to lose


@dataclass(frozen=True)
class Patch:
    """A patch and the scale it is to be used with. `0.5 * patch`, `-patch` give one with another scale.

    Two are equal when id and scale are.

    Attributes:
        path: the file or folder; None while it lies in temporary storage only.
        header: see `PatchHeader`; its `scale` is the default, `scale` here the one in force.
        id: the patch's identity, whatever files it lies in.
    """

    path: Path | None = field(compare=False)
    header: PatchHeader = field(compare=False)
    id: str
    scale: float
    _files: PatchFiles = field(compare=False)
    _extents: Mapping[str, Extent] = field(compare=False)

    @property
    def label(self) -> str:
        return str(self.path) if self.path is not None else f"patch {self.id[:12]}"

    @property
    def files(self) -> dict[str, Path]:
        """{file name: path} of the files it lies in, the index included."""
        return dict(self._files.paths)

    def opened_files(self) -> dict[str, os.stat_result]:
        """{file name: what is open}: which file that is, whatever lies under its path by now."""
        return {name: os.fstat(fd) for name, fd in self._files.descriptors.items()}

    @property
    def records(self) -> Mapping[str, Record]:
        return self.header.tensors

    def __mul__(self, factor: float) -> Patch:
        try:
            number = float(factor)
        except TypeError:
            return NotImplemented
        return self.at(self.scale * number)

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return self * -1.0

    def at(self, scale: float) -> Patch:
        """The same patch with that scale, whatever it had.

        Raises:
            UsageError: it is no finite number of fp32, in which scales are used.
        """
        if not abs(scale) < DTYPES["F32"].limit:
            raise UsageError(f"{self.label} at scale {scale:g}", "give a finite number as the scale")
        return replace(self, scale=float(scale))

    @property
    def exact_scale(self) -> float:
        """The scale as arithmetic uses it: rounded to fp32."""
        return round_scale(self.scale)

    def encoding(self, name: str) -> Encoding:
        """How a tensor is stored; none is asked for of one that the patch removes."""
        return ENCODINGS.get(self.records[name].encoding)

    def lossless(self, name: str) -> bool:
        """Whether a tensor is stored bit for bit, so that its change is defined on its very base only."""
        return self.records[name].encoding != REMOVED and self.encoding(name).lossless

    def parts(self, name: str) -> StoredParts:
        """The stored parts of a tensor; a new object with an empty cache."""
        record = self.records[name]
        extents = {part: self._extents[p.entry] for part, p in record.parts.items()}
        return StoredParts(record.spec(name), record.parameters, extents, self._files)

    def nbytes(self, name: str | None = None) -> int:
        """Stored bytes of one tensor, or of all."""
        names = self.records if name is None else [name]
        return sum(self._extents[p.entry].spec.nbytes for n in names for p in self.records[n].parts.values())

    def verify(self, resources: Resources | None = None) -> None:
        """Reads every part and checks its digest.

        Raises:
            IntegrityError: lists every part that is not what the header says.
        """
        wrong: list[str] = []

        def check(task: tuple[str, str], workspace: Workspace) -> None:
            name, part = task
            if self.parts(name).digest(part, workspace) != self.records[name].parts[part].digest:
                wrong.append(f"{name}, part {part!r}")

        tasks = sorted(
            ((n, p) for n, r in self.records.items() for p in r.parts),
            key=lambda t: -self._extents[self.records[t[0]].parts[t[1]].entry].spec.nbytes,
        )
        run(tasks, check, resources or Resources())
        if wrong:
            raise IntegrityError(
                f"{self.label}: {len(wrong)} parts are damaged (their digests do not match)",
                "get the patch again",
                sorted(wrong),
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Patch:
        """Copies the patch to a file (`NAME.safetensors`) or a folder (any other name), whole or not at all.

        The scale in force becomes the default scale of the copy; where that differs, so does its id.

        Args:
            overwrite: replace a file that is there; a folder is never replaced.

        Returns:
            the patch at its new place.

        Raises:
            UsageError: it is sharded and `path` is one file.
            NotPatchableError: something is there already.
        """
        target = Path(path)
        sources = list(self.files.values())
        if target.name.endswith(".safetensors"):
            if len(sources) > 1:
                raise UsageError(f"{self.label} is sharded", "give a folder's name, without .safetensors")
            with atomic_file(target, overwrite=overwrite) as temporary:
                copy_files({sources[0]: temporary}, self.header, self.scale)
        else:
            with atomic_folder(target) as folder:
                names = [s.name for s in sources] if len(sources) > 1 else [shard_name(0, 1)]
                places = {s: folder / n for s, n in zip(sources, names, strict=True)}
                copy_files(places, self.header, self.scale)
        return open_patch(target)

    def summary(self) -> list[dict[str, object]]:
        """One row a tensor: name, encoding, shape, stored bytes, recorded errors."""
        return [
            {
                "name": name,
                "encoding": record.encoding,
                "dtype": record.dtype,
                "shape": record.shape,
                "bytes": self.nbytes(name),
                "max_abs_error": record.error.max_abs if record.error else (0.0 if record.result_digest else None),
                "relative_error": record.error.relative_l2 if record.error else (0.0 if record.result_digest else None),
            }
            for name, record in self.records.items()
        ]

    def __repr__(self) -> str:
        return f"Patch({self.label!r}, {self.header.kind}, {len(self.records)} tensors, scale {self.scale:g})"


def is_patch(path: Path) -> bool:
    """Whether a path holds a weightlab patch; looks at names and at one header, raises nothing for other files."""
    try:
        files, _ = files_of(path)
        return KEY in read_header(next(iter(files.values()))).metadata
    except (MissingInputError, MalformedFileError):
        return False


def open_patch(path: str | os.PathLike[str], *, temporary: bool = False) -> Patch:
    """Opens a patch and checks its headers; parts are checked by `verify`.

    Args:
        temporary: `path` is a folder of our own, to be removed when the patch is no longer used.

    Raises:
        MissingInputError: nothing is there.
        MalformedFileError: it is no patch, or breaks the format.
        IntegrityError: its files do not belong together.
    """
    place = Path(path)
    paths, index = files_of(place)
    headers = {name: read_header(p) for name, p in paths.items() if name != INDEX_NAME or index is None}
    header, identity = joined(place, {n: parse_header(h.metadata, str(paths[n])) for n, h in headers.items()})
    headers = {n: replace(h, metadata={}) for n, h in headers.items()}  # it says the same, at length
    check_entries(place, header, headers, index)
    files = PatchFiles(paths, place if temporary else None)
    extents = {
        entry: Extent(files.descriptors[file], paths[file], e.offset, e.spec)
        for file, h in headers.items()
        for entry, e in h.entries.items()
    }
    return Patch(None if temporary else place, header, identity, header.scale, files, extents)


def stand_in(path: Path, patch_id: str) -> Patch:
    """A patch without tensors, in the place of one that cannot be read."""
    header = PatchHeader(schema=SCHEMA, kind="diff", method=Method(name="unreadable"), base=Base(), tensors={})
    return Patch(path, header, patch_id, 1.0, PatchFiles({}), {})
