"""Reading the stored parts of one tensor from a patch's file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from weightlab.encodings import Buffers
from weightlab.errors import IntegrityError
from weightlab.files.digest import PartDigest
from weightlab.files.disk import read_exactly
from weightlab.tensors.spec import TensorSpec, compute_dtype

Cached = TypeVar("Cached")
_CHUNK = 2**21


@dataclass(frozen=True, slots=True)
class Extent:
    """A part's place: an open file, the absolute offset, and what lies there."""

    fd: int
    path: Path
    offset: int
    spec: TensorSpec


class StoredParts:
    """The parts of one tensor (see `encodings.Parts`); reads from several threads at a time.

    Args:
        files: what must live as long, so that the files of the extents stay open.
    """

    def __init__(
        self, spec: TensorSpec, parameters: Mapping[str, Any], extents: Mapping[str, Extent], files: object = None
    ) -> None:
        self.spec = spec
        self.parameters = parameters
        self.extents = extents
        self._files = files
        self._cache: dict[str, Any] = {}
        self._lock = threading.RLock()

    @property
    def compute(self) -> torch.dtype:
        """What the difference is computed in: fp64 where the tensor or what is stored of it is fp64, else fp32."""
        return compute_dtype(self.spec, *(extent.spec for extent in self.extents.values()))

    def numel(self, part: str) -> int:
        return self.extents[part].spec.numel

    def read(self, part: str, start: int, stop: int, buffers: Buffers) -> Tensor:
        extent = self.extents[part]
        if not 0 <= start <= stop <= extent.spec.numel:
            raise IntegrityError(f"{self.spec.name}: its part {part!r} is too short", "get the patch again")
        dtype = extent.spec.type
        assert dtype.torch is not None
        raw = buffers.buffer(f"part {part}", (stop - start) * dtype.itemsize, torch.uint8)
        read_exactly(extent.fd, extent.offset + start * dtype.itemsize, raw, extent.path)
        return raw.view(dtype.torch)

    def cached(self, key: str, make: Callable[[], Cached]) -> Cached:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = make()
            found: Cached = self._cache[key]
            return found

    def whole(self, part: str) -> Tensor:
        def load() -> Tensor:
            spec = self.extents[part].spec
            raw = torch.empty(spec.nbytes, dtype=torch.uint8)
            read_exactly(self.extents[part].fd, self.extents[part].offset, raw, self.extents[part].path)
            assert spec.type.torch is not None
            return raw.view(spec.type.torch).reshape(spec.shape)

        return self.cached(f"part {part}", load)

    def release(self) -> None:
        """Forgets what was cached, which is made anew if it is needed again."""
        with self._lock:
            self._cache.clear()

    def digest(self, part: str, buffers: Buffers) -> str:
        """Reads a whole part and computes its digest."""
        extent = self.extents[part]
        digest = PartDigest(extent.spec.dtype)
        for start in range(0, extent.spec.nbytes, _CHUNK):
            raw = buffers.buffer("digest", min(_CHUNK, extent.spec.nbytes - start), torch.uint8)
            read_exactly(extent.fd, extent.offset + start, raw, extent.path)
            digest.update(raw.numpy().data)
        return digest.hexdigest(extent.spec.shape)
