"""Safetensors on disk: one file, or a folder with one file or with shards and their index."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.files.container import Entry, Header, read_header
from weightlab.files.disk import read_exactly, storage_errors
from weightlab.files.foreign import strict_json
from weightlab.sources._quantised import codes_in, opaque_names, read_config
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


class LocalSource:
    """Tensors in safetensors files, read by offset.

    Attributes:
        folder: where the files lie.
        anchor: the name of the file or of the index: what the checkpoint's state on disk is keyed by.
        headers: {file name: header}, in order of name; with an index only its files count.
        index: the index's whole content when there is one.
        paths: {file name: where it lies now}; another name than usual while it is set aside.
    """

    def __init__(
        self,
        path: Path,
        anchor: Path,
        headers: dict[str, Header],
        index: dict[str, object] | None,
        suffixes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.path: Path | None = path
        self.label = str(path)
        self.folder = anchor.parent
        self.anchor = anchor.name
        self.headers = headers
        self.paths = {file: anchor.parent / (file + suffixes.get(file, "")) for file in headers}
        self.index = index
        self.file_of: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        for file, header in headers.items():
            for name, entry in header.entries.items():
                self._entries[name] = entry
                self.file_of[name] = file
        self.specs: Mapping[str, TensorSpec] = {name: entry.spec for name, entry in self._entries.items()}
        self.config = read_config(self.folder)
        self.codes: Mapping[str, Code] = codes_in(self.specs, self.config)
        self.opaque = opaque_names(self.specs, self.codes)
        self.aliases: Mapping[str, str] = {}
        self._descriptors: dict[str, int] = {}

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
    """The safetensors file or index that stands for the checkpoint at `path`; None when there is none.

    In a folder an index wins, `model.safetensors.index.json` before others; without one there must be one file.

    Raises:
        MalformedFileError: several files or several indexes and nothing that says which is the model.
    """
    if path.is_file():
        return path if path.name.endswith((SUFFIX, INDEX_SUFFIX)) else None
    for pattern, usual in ((f"*{INDEX_SUFFIX}", f"model{INDEX_SUFFIX}"), (f"*{SUFFIX}", f"model{SUFFIX}")):
        found = sorted(p for p in path.glob(pattern) if p.is_file() and not p.name.startswith("."))
        preferred = [p for p in found if p.name == usual] or found
        if len(preferred) > 1:
            raise MalformedFileError(
                f"{path}: {len(preferred)} files could be the model and no index says which",
                "give the path of one file, or add the index",
                [p.name for p in preferred],
            )
        if preferred:
            return preferred[0]
    return None


class _Local:
    def claims(self, path: Path) -> bool:
        return find_anchor(path) is not None

    def open(self, path: Path, key: str | None) -> LocalSource:
        anchor = find_anchor(path)
        if anchor is None:
            raise MissingInputError(f"{path}: no safetensors file", "check the path")
        return open_anchor(path, anchor)


def open_local(path: Path) -> LocalSource:
    """Opens a safetensors file or folder."""
    return SOURCE.open(path, None)


def open_anchor(path: Path, anchor: Path, set_aside: str = "") -> LocalSource:
    """Opens the checkpoint that a safetensors file or an index stands for.

    Args:
        path: what the user named; for messages.
        set_aside: files that lie under their name with this suffix are read there.
    """
    if anchor.name.endswith(INDEX_SUFFIX):
        return _open_sharded(path, anchor, set_aside)
    suffixes = _suffixes(anchor.parent, [anchor.name], set_aside)
    header = read_header(anchor.parent / (anchor.name + suffixes[anchor.name]))
    return LocalSource(path, anchor, {anchor.name: header}, None, suffixes)


def shards_in(index: Path) -> frozenset[str]:
    """The file names that an index lists; none when it is no index."""
    try:
        tree = strict_json(index.read_bytes())
    except (ValueError, RecursionError):
        return frozenset()
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    return frozenset(str(v) for v in weight_map.values()) if isinstance(weight_map, dict) else frozenset()


def _suffixes(folder: Path, files: Iterable[str], set_aside: str) -> dict[str, str]:
    return {f: set_aside if set_aside and (folder / (f + set_aside)).is_file() else "" for f in files}


def _open_sharded(path: Path, anchor: Path, set_aside: str) -> LocalSource:
    try:
        index = strict_json(anchor.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{anchor}: not proper JSON: {error}", "get the file again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise MalformedFileError(f"{anchor}: has no weight_map of names to files", "get the file again")
    files = sorted(set(weight_map.values()))
    outside = [f for f in files if not f or f in (".", "..") or "/" in f or "\\" in f or "\0" in f]
    if outside:
        raise MalformedFileError(
            f"{anchor}: points outside its folder", "do not use this file", [repr(f) for f in outside]
        )
    suffixes = _suffixes(anchor.parent, files, set_aside)
    missing = [f for f in files if not (anchor.parent / (f + suffixes[f])).is_file()]
    if missing:
        raise MissingInputError(
            f"{anchor}: {len(missing)} of {len(files)} shards are missing", "get the missing files", missing
        )
    headers = {f: read_header(anchor.parent / (f + suffixes[f])) for f in files}
    _check_index(anchor, weight_map, headers)
    return LocalSource(path, anchor, headers, index, suffixes)


def _check_index(anchor: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file, header in headers.items():
        for name in header.entries:
            places[name].append(file)
    twice = [f"{name}: in {' and '.join(files)}" for name, files in places.items() if len(files) > 1]
    if twice:
        raise MalformedFileError(
            f"{anchor}: {len(twice)} tensors are in more than one shard", "get the files again", twice
        )
    wrong = [f"{n}: not in {f}" for n, f in weight_map.items() if places.get(n) != [f]]
    wrong += [f"{n}: in {files[0]} and not in the index" for n, files in places.items() if n not in weight_map]
    if wrong:
        raise MalformedFileError(f"{anchor}: the index and the shards disagree", "get the files again", wrong)


SOURCE = _Local()
