"""A patch that lies in a file or folder, opened: header, parts, checks."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from weightlab.encodings import ENCODINGS, Encoding
from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError, UsageError
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder
from weightlab.files.container import Header, read_header, strict_json
from weightlab.patches.header import KEY, PatchHeader, Record, parse_header
from weightlab.patches.layout import INDEX_NAME
from weightlab.patches.parts import Extent, StoredParts
from weightlab.stream.executor import Resources, Workspace, run
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.spec import TensorSpec


class _Files:
    """The open files of a patch, closed when the last patch object that uses them is gone."""

    def __init__(self, paths: Mapping[str, Path], temporary: Path | None = None) -> None:
        self.paths = dict(paths)
        self.descriptors = {name: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for name, path in paths.items()}
        weakref.finalize(self, _close, list(self.descriptors.values()), temporary)


def _close(descriptors: list[int], temporary: Path | None) -> None:
    for fd in descriptors:
        os.close(fd)
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)  # a temporary folder at exit: nothing to lose


@dataclass(frozen=True)
class Patch:
    """A patch and the scale it is to be used with. `0.5 * patch`, `-patch` give one with another scale.

    Attributes:
        path: the file or folder; None while it lies in temporary storage only.
        header: see `PatchHeader`; its `scale` is the default, `scale` here the one in force.
        id: the patch's identity, whatever files it lies in.
    """

    path: Path | None
    header: PatchHeader
    id: str
    scale: float
    _files: _Files
    _extents: Mapping[str, Extent]

    @property
    def label(self) -> str:
        return str(self.path) if self.path is not None else f"patch {self.id[:12]}"

    @property
    def files(self) -> dict[str, Path]:
        """{file name: path} of the files it lies in, the index included."""
        return dict(self._files.paths)

    @property
    def records(self) -> Mapping[str, Record]:
        return self.header.tensors

    def __mul__(self, factor: float) -> Patch:
        return replace(self, scale=self.scale * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return self * -1.0

    def at(self, scale: float) -> Patch:
        """The same patch with that scale, whatever it had."""
        return replace(self, scale=float(scale))

    @property
    def exact_scale(self) -> float:
        """The scale as arithmetic uses it: rounded to fp32."""
        return round_scale(self.scale)

    def encoding(self, name: str) -> Encoding:
        return ENCODINGS.get(self.records[name].encoding)

    def parts(self, name: str) -> StoredParts:
        """The stored parts of a tensor; a new object with an empty cache."""
        record = self.records[name]
        extents = {part: self._extents[p.entry] for part, p in record.parts.items()}
        return StoredParts(record.spec(name), record.parameters, extents)

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

        The scale is not saved with it: it belongs to the use of a patch. Write a patch with another default scale
        with `weightlab.compose`.

        Returns:
            the patch at its new place.
        """
        target = Path(path)
        files = self.files
        if target.name.endswith(".safetensors"):
            if len(files) > 1:
                raise UsageError(f"{self.label} is sharded", "give a folder's name, without .safetensors")
            with atomic_file(target, overwrite=overwrite) as temporary:
                _copy(next(iter(files.values())), temporary)
        else:
            with atomic_folder(target) as folder:
                for name, source in files.items():
                    _copy(source, folder / (name if len(files) > 1 else "patch.safetensors"))
        return open_patch(target).at(self.scale)

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


def _copy(source: Path, target: Path) -> None:
    fd = disk.create(target)
    try:
        with source.open("rb") as opened:
            disk.copy_range(opened.fileno(), 0, fd, 0, os.fstat(opened.fileno()).st_size, target)
    finally:
        os.close(fd)


def is_patch(path: Path) -> bool:
    """Whether a path holds a weightlab patch; looks at names and at one header, raises nothing for other files."""
    try:
        files = _files_of(path)
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
    paths = _files_of(place)
    headers = {name: read_header(p) for name, p in paths.items() if name != INDEX_NAME}
    header = _joined(place, {n: parse_header(h.metadata, str(paths[n])) for n, h in headers.items()})
    _check_entries(place, header, headers)
    files = _Files(paths, place if temporary else None)
    extents = {
        entry: Extent(files.descriptors[file], paths[file], e.offset, TensorSpec(entry, e.spec.dtype, e.spec.shape))
        for file, h in headers.items()
        for entry, e in h.entries.items()
    }
    return Patch(None if temporary else place, header, header.id(), header.scale, files, extents)


def _files_of(place: Path) -> dict[str, Path]:
    if place.is_file():
        return {place.name: place}
    if not place.is_dir():
        raise MissingInputError(f"{place}: no such patch", "check the path")
    index = place / INDEX_NAME
    if not index.is_file():
        single = place / "patch.safetensors"
        if not single.is_file():
            raise MissingInputError(f"{place}: holds no patch.safetensors", "check the path")
        return {single.name: single}
    try:
        names = sorted(set(strict_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedFileError(f"{index}: not the index of a patch", "get the patch again") from error
    if not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise MalformedFileError(f"{index}: points outside its folder", "do not use this file")
    missing = [n for n in names if not (place / n).is_file()]
    if missing:
        raise MissingInputError(f"{place}: {len(missing)} of {len(names)} files are missing", "get them", missing)
    return {n: place / n for n in names} | {INDEX_NAME: index}


def _joined(place: Path, headers: Mapping[str, PatchHeader]) -> PatchHeader:
    first = next(iter(headers.values()))
    if first.shard is None and len(headers) == 1:
        return first
    shards = {h.shard for h in headers.values()}
    tensors: dict[str, Record] = {}
    for file, header in sorted(headers.items()):
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise IntegrityError(f"{place}: tensors in two shards", "get the patch again", sorted(twice))
        tensors.update(header.tensors)
        shard = header.shard
        if shard is None or shard.count != len(headers):
            raise IntegrityError(f"{place}: {file} is not one of {len(headers)} shards", "get the patch again")
    joined = first.model_copy(update={"tensors": tensors, "shard": None})
    ids = {s.id for s in shards if s is not None}
    if ids != {joined.id()} or len({s.index for s in shards if s is not None}) != len(headers):
        raise IntegrityError(f"{place}: its shards are not those of one patch", "get the patch again", sorted(ids))
    return joined


def _check_entries(place: Path, header: PatchHeader, files: Mapping[str, Header]) -> None:
    found = {entry: e.spec for h in files.values() for entry, e in h.entries.items()}
    listed = [p.entry for r in header.tensors.values() for p in r.parts.values()]
    wrong = (
        [f"{entry}: listed twice" for entry in sorted({e for e in listed if listed.count(e) > 1})]
        if len(set(listed)) != len(listed)
        else []
    )
    wrong += [f"{entry}: listed and not there" for entry in listed if entry not in found]
    wrong += [f"{entry}: there and not listed" for entry in sorted(found.keys() - set(listed))]
    for name, record in header.tensors.items():
        if record.encoding == "removed":
            wrong += [f"{name}: removed and has parts"] if record.parts else []
            continue
        parts = {part: found[p.entry] for part, p in record.parts.items() if p.entry in found}
        if len(parts) == len(record.parts):
            wrong += [f"{name}: {problem}" for problem in _part_problems(place, name, record, parts)]
    if wrong:
        raise MalformedFileError(f"{place}: its header and its parts disagree", "get the patch again", wrong)


def _part_problems(place: Path, name: str, record: Record, parts: Mapping[str, TensorSpec]) -> list[str]:
    try:
        encoding = ENCODINGS.get(record.encoding)
    except UsageError as error:
        raise MalformedFileError(
            f"{place}: {name} has an unknown encoding {record.encoding!r}", error.remedy
        ) from error
    try:
        expected = encoding.expected(record.spec(name), record.parameters)
    except (ValueError, KeyError, TypeError) as error:
        return [f"parameters {json.dumps(record.parameters)} make no sense ({error})"]
    problems = [f"part {p!r} is missing" for p in expected if p not in parts]
    problems += [f"part {p!r} is unknown" for p in parts if p not in expected]
    problems += [f"part {p!r} {e}" for p in parts if p in expected and (e := expected[p].problem(parts[p]))]
    return problems
