"""Safetensors on disk: one file, or a folder with one file or with shards and their index, and the model's parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from weightlab.errors import InputError, MalformedFileError, MissingInputError
from weightlab.files.container import Entry, Header, read_header
from weightlab.files.disk import read_exactly, storage_errors
from weightlab.sources._choice import INDEX_SUFFIX, SUFFIX, pickle_in, safetensors_in
from weightlab.sources._index import agree, read_index, shards_in
from weightlab.sources._parts import parts_of
from weightlab.sources._quantised import caution, codes_in, opaque_names, read_config
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

__all__ = [
    "INDEX_SUFFIX",
    "LocalSource",
    "find_anchor",
    "open_anchor",
    "open_local",
    "owner_of",
    "pickled_parts",
    "shards_in",
]


Aside: TypeAlias = Callable[[str], str] | None
"""What a file is called while it is set aside."""


@dataclass(slots=True)
class _Part:
    """A folder's files: headers with the tensors that count, under their own names."""

    prefix: str
    headers: dict[str, Header]
    config: dict[str, Any]
    index: tuple[str, dict[str, Any]] | None = None
    now: Mapping[str, str] = field(default_factory=dict)
    fuller: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def key(self, name: str) -> str:
        """A file or tensor of this part, as the whole model calls it."""
        return f"{self.prefix}/{name}" if self.prefix else name


class LocalSource:
    """Tensors in safetensors files, read by offset.

    Files and tensors of a part of the model (see `_parts`) are called by its folder, `/` and their own name.

    Attributes:
        folder: the model's folder.
        anchor: the name of the file, of the index or of the list of parts: what the checkpoint's state on disk is keyed
            by.
        headers: {file: header with the tensors that count}, in order of name; with an index only its files count.
        indexes: {index file: its whole content}.
        paths: {file: where it lies now}; another name than usual while it is set aside.
        configs: {folder of a part: its config.json}; "" is the model's own folder.
        fuller: files that hold more tensors than count.
        elsewhere: tensors of which a further shard has a copy that does not count.
        alone: it is one file of a model with parts.
        cautions: what index and shards disagree in.
    """

    def __init__(self, path: Path, anchor: Path, parts: Sequence[_Part], *, alone: bool = False) -> None:
        self.path: Path | None = path
        self.label = str(path)
        self.folder = anchor.parent
        self.anchor = anchor.name
        self.alone = alone
        self.headers: dict[str, Header] = {}
        self.paths: dict[str, Path] = {}
        self.indexes: dict[str, dict[str, Any]] = {}
        self.file_of: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        self.configs = {part.prefix: part.config for part in parts}
        self.config = self.configs.get("", {})
        self.fuller = frozenset(part.key(file) for part in parts for file in part.fuller)
        self.elsewhere = frozenset(part.key(name) for part in parts for name in part.elsewhere)
        self.cautions = tuple(note for part in parts for note in part.notes)
        found: dict[str, Code] = {}
        for part in parts:
            if part.index is not None:
                self.indexes[part.key(part.index[0])] = part.index[1]
            specs = {n: e.spec for header in part.headers.values() for n, e in header.entries.items()}
            codes = codes_in(specs, part.config)
            found |= {part.key(name): Code(code.kind, part.key(code.module)) for name, code in codes.items()}
            self.cautions += (told,) if (told := caution(codes, part.config)) else ()
            for file, header in part.headers.items():
                self._take(part, file, header)
        self.specs: Mapping[str, TensorSpec] = {name: entry.spec for name, entry in self._entries.items()}
        self.codes: Mapping[str, Code] = found
        self.opaque = opaque_names(self.specs, found)
        self.aliases: Mapping[str, str] = {}
        self._descriptors: dict[str, int] = {}

    def _take(self, part: _Part, file: str, header: Header) -> None:
        key = part.key(file)
        entries = header.entries
        if part.prefix:
            entries = {part.key(n): Entry(replace(e.spec, name=part.key(n)), e.offset) for n, e in entries.items()}
        twice = [f"{name}: in {self.file_of[name]} and in {key}" for name in entries if name in self._entries]
        if twice:
            raise MalformedFileError(f"{self.label}: two parts have tensors of one name", "rename the folder", twice)
        self.headers[key] = replace(header, entries=entries)
        self.paths[key] = self.folder / part.prefix / part.now.get(file, file)
        self._entries.update(entries)
        self.file_of.update(dict.fromkeys(entries, key))

    @property
    def files(self) -> frozenset[str]:
        """The model's own files, relative to its folder."""
        return frozenset((*self.headers, *self.indexes))

    def entry(self, name: str) -> Entry:
        return self._entries[name]

    def descriptor(self, file: str) -> int:
        """An open descriptor of one of the files, for reading; kept until `close`."""
        if file not in self._descriptors:
            with storage_errors(self.paths[file]):
                opened = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
            if self._descriptors.setdefault(file, opened) != opened:  # another thread was first
                os.close(opened)
        return self._descriptors[file]

    def read(self, name: str, start: int, out: Tensor) -> None:
        file = self.file_of[name]
        read_exactly(self.descriptor(file), self._entries[name].offset + start, out, self.paths[file])

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def find_anchor(path: Path) -> Path | None:
    """The file that stands for the safetensors checkpoint at `path`; None when there is none.

    A safetensors file or an index; of a model with parts that of its own folder, or, where only parts have weights,
    the list of the parts.

    Raises:
        MalformedFileError: several files or several indexes and nothing that says which is the model.
        MissingInputError: shards without their index.
    """
    if path.is_file():
        return path if path.name.endswith((SUFFIX, INDEX_SUFFIX)) else None
    if not path.is_dir():
        return None
    parts = parts_of(path)
    if parts is None:
        return safetensors_in(path)
    found = [safetensors_in(path / prefix) for prefix in parts.prefixes]
    if not any(found):
        return None
    own = found[parts.prefixes.index("")] if "" in parts.prefixes else None
    return own or path / parts.listing


def pickled_parts(path: Path) -> list[str]:
    """The parts of a model in a folder whose weights are pickles: the files, relative to the folder."""
    parts = parts_of(path) if path.is_dir() else None
    if parts is None:
        return []
    pickles = [pickle_in(path / p) for p in parts.prefixes if safetensors_in(path / p) is None]
    return [str(p.relative_to(path)) for p in pickles if p is not None]


def owner_of(path: Path) -> Path | None:
    """The folder of the model that a folder, or the folder of a file, is a part of; None where it is none."""
    folder = (path if path.is_dir() else path.parent).absolute()
    for depth in range(1, min(4, len(folder.parents))):
        above = folder.parents[depth - 1]
        try:
            parts = parts_of(above)
        except InputError:  # not a list that could be used
            continue
        if parts is not None and folder.relative_to(above).as_posix() in parts.prefixes:
            return above
    return None


class _Local:
    def claims(self, path: Path) -> bool:
        return find_anchor(path) is not None and not pickled_parts(path)

    def open(self, path: Path, key: str | None) -> LocalSource:
        anchor = find_anchor(path)
        if anchor is None:
            raise MissingInputError(f"{path}: no safetensors file", "check the path")
        if path.is_dir():
            return open_anchor(path, anchor)
        return LocalSource(path, anchor, [_open_part(anchor, "", None)], alone=_has_parts(anchor))


def open_local(path: Path) -> LocalSource:
    """Opens a safetensors file or folder."""
    return SOURCE.open(path, None)


def open_anchor(path: Path, anchor: Path, set_aside: Aside = None) -> LocalSource:
    """Opens the checkpoint that a safetensors file, an index or a list of parts stands for, with all its parts.

    Of parts that are pickles nothing is read.

    Args:
        path: what the user named; for messages.
        set_aside: what a file is called while it is set aside; those that are there under that name are read there.
    """
    prefixes = _prefixes(anchor, set_aside)
    if prefixes is None:
        return LocalSource(path, anchor, [_open_part(anchor, "", set_aside)])
    found = [(prefix, safetensors_in(anchor.parent / prefix, set_aside)) for prefix in prefixes]
    parts = [_open_part(file, prefix, set_aside) for prefix, file in found if file is not None]
    return LocalSource(path, anchor, parts)


def _prefixes(anchor: Path, set_aside: Aside) -> tuple[str, ...] | None:
    """The parts of the model that an anchor stands for; None where it stands for its own files only."""
    parts = parts_of(anchor.parent)
    if parts is None or anchor.name == parts.listing:
        return None if parts is None else parts.prefixes
    if "" not in parts.prefixes:
        return None
    try:
        own = safetensors_in(anchor.parent, set_aside)
    except InputError:  # several: the one that was named is none of the model's
        return None
    return parts.prefixes if own is not None and own.name == anchor.name else None


def _has_parts(anchor: Path) -> bool:
    """Whether a file stands for a model that has further parts."""
    try:
        return len(_prefixes(anchor, None) or ()) > 1
    except InputError:  # a list that cannot be used says nothing of a file that is named by itself
        return False


def _open_part(anchor: Path, prefix: str, set_aside: Aside) -> _Part:
    folder = anchor.parent
    config = read_config(folder)
    if not anchor.name.endswith(INDEX_SUFFIX):
        now = _names_now(folder, [anchor.name], set_aside)
        return _Part(prefix, {anchor.name: read_header(folder / now[anchor.name])}, config, now=now)
    tree, weight_map = read_index(anchor)
    files = sorted(set(weight_map.values()))
    now = _names_now(folder, files, set_aside)
    missing = [f for f in files if not (folder / now[f]).is_file()]
    if missing:
        whole = folder / f"model{SUFFIX}"
        remedy = f"get the missing files, or give the path of {whole}" if whole.is_file() else "get the missing files"
        raise MissingInputError(f"{anchor}: {len(missing)} of {len(files)} shards are missing", remedy, missing)
    headers = {f: read_header(folder / now[f]) for f in files}
    found = agree(anchor, weight_map, headers, config)
    fuller: list[str] = []
    for file, header in headers.items():
        own = {name: entry for name, entry in header.entries.items() if found.owners.get(name) == file}
        if len(own) < len(header.entries):
            headers[file] = replace(header, entries=own)
            fuller.append(file)
    return _Part(prefix, headers, config, (anchor.name, tree), now, fuller, found.elsewhere, found.notes)


def _names_now(folder: Path, files: Iterable[str], set_aside: Aside) -> dict[str, str]:
    aside = {} if set_aside is None else {f: set_aside(f) for f in files}
    return {f: aside[f] if f in aside and (folder / aside[f]).is_file() else f for f in files}


SOURCE = _Local()
