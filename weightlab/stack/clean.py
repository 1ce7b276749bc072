"""A checkpoint as it would be without the patches that are on it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from weightlab.errors import IntegrityError
from weightlab.files.disk import read_exactly, storage_errors
from weightlab.sources.local import LocalSource
from weightlab.stack.records import DROP, Touched
from weightlab.stack.state import ORIGINALS, StatePlace
from weightlab.tensors.spec import TensorSpec


class CleanSource:
    """A checkpoint without its patches: touched tensors are read from their kept clean bytes.

    Raises:
        IntegrityError: lists the touched tensors that the checkpoint does not have in these files; or clean bytes are
            missing or fewer than the tensors have.
    """

    def __init__(self, source: LocalSource, place: StatePlace, touched: Mapping[str, Touched]) -> None:
        self._source, self._originals, self._touched = source, place.path / ORIGINALS, touched
        self.label, self.path = source.label, source.path
        self.specs: Mapping[str, TensorSpec] = source.specs
        self.aliases, self.opaque, self.codes = source.aliases, source.opaque, source.codes
        self.config, self.configs = source.config, source.configs
        self._descriptors: dict[str, int] = {}
        strange = [f"{n}: not in {known.file}" for n, known in touched.items() if source.file_of.get(n) != known.file]
        if strange:
            raise IntegrityError(f"{place.path}: names tensors that the checkpoint does not have", DROP, strange)
        ends: dict[str, int] = {}
        for name, known in touched.items():
            size = source.specs[name].nbytes
            ends[known.original.file] = max(ends.get(known.original.file, 0), known.original.offset + size)
        try:
            self._open(place, ends)
        except BaseException:
            self.close()
            raise

    def _open(self, place: StatePlace, ends: Mapping[str, int]) -> None:
        with place.opened(ORIGINALS) as originals:
            for file, end in sorted(ends.items()):
                path = self._originals / file
                if originals is None or originals.kind(file) is None:
                    raise IntegrityError(f"{path} is missing", DROP)
                self._descriptors[file] = originals.open_file(file)
                with storage_errors(path):
                    found = os.fstat(self._descriptors[file]).st_size
                if found < end:
                    raise IntegrityError(f"{path} has {found:,} bytes, and {end:,} were kept", DROP)

    def read(self, name: str, start: int, out: Tensor) -> None:
        touched = self._touched.get(name)
        if touched is None:
            self._source.read(name, start, out)
        else:
            file = touched.original.file
            read_exactly(self._descriptors[file], touched.original.offset + start, out, self._originals / file)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
