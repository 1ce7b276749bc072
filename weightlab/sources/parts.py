"""Models with parts of which some are pickles: `2_Dense/pytorch_model.bin` beside safetensors, or all of them.

Where all parts are safetensors, `local` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.sources import Source
from weightlab.sources._parts import parts_of
from weightlab.sources.local import LocalSource, find_anchor, open_anchor, pickled_parts
from weightlab.sources.pickled import SOURCE as PICKLED
from weightlab.sources.pickled import PickledSource
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec


class PartsSource:
    """All parts of a model as one.

    Attributes:
        local: the parts that are safetensors; None where there are none.
        pickles: {folder of a part: its pickles}.
        configs: {folder of a part: its config.json}.
        files: the model's own files, relative to its folder.
        cautions: what whoever uses it must know.
    """

    def __init__(self, path: Path, local: LocalSource | None, pickles: Mapping[str, PickledSource]) -> None:
        self.path: Path | None = path
        self.label = str(path)
        self.folder = path
        self.local, self.pickles = local, pickles
        self.configs = {**(local.configs if local else {}), **{prefix: p.config for prefix, p in pickles.items()}}
        self.config = self.configs.get("", {})
        self.cautions = tuple(c for source in (local, *pickles.values()) for c in getattr(source, "cautions", ()))
        self.files = {f"{prefix}/{name}" if prefix else name for prefix, p in pickles.items() for name in p.files}
        self._owners: dict[str, tuple[Source, str]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.aliases: dict[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}
        if local is not None:
            self.files |= {*local.files}
            self._take(local, "")
        for prefix, pickle in pickles.items():
            self._take(pickle, f"{prefix}/" if prefix else "")

    def _take(self, source: Source, prefix: str) -> None:
        twice = [prefix + name for name in source.specs if prefix + name in self._owners]
        if twice:
            raise MalformedFileError(f"{self.label}: two parts have tensors of one name", "rename the folder", twice)
        for name, spec in source.specs.items():
            self.specs[prefix + name] = replace(spec, name=prefix + name) if prefix else spec
            self._owners[prefix + name] = source, name
        self.aliases |= {prefix + alias: prefix + name for alias, name in source.aliases.items()}
        self.opaque |= _named(prefix, source.opaque)
        mine = {prefix + name: Code(code.kind, prefix + code.module) for name, code in source.codes.items()}
        self.codes = {**self.codes, **mine}

    def read(self, name: str, start: int, out: Tensor) -> None:
        source, own = self._owners[name]
        source.read(own, start, out)

    def close(self) -> None:
        for source in (self.local, *self.pickles.values()):
            if source is not None:
                source.close()


def _named(prefix: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(prefix + name for name in names)


class _Parts:
    def claims(self, path: Path) -> bool:
        return bool(pickled_parts(path))

    def open(self, path: Path, key: str | None) -> PartsSource:
        parts = parts_of(path)
        if parts is None:
            raise MissingInputError(f"{path}: has no list of parts", "check the path")
        pickles: dict[str, PickledSource] = {}
        for file in pickled_parts(path):
            folder = (path / file).parent
            pickles[file.rpartition("/")[0]] = PICKLED.open(folder, key)
        anchor = find_anchor(path)
        return PartsSource(path, None if anchor is None else open_anchor(path, anchor), pickles)


SOURCE = _Parts()
"""Plug-in for `weightlab.sources`."""
