"""Writing a patch: parts are streamed to their places, digests taken on the way, headers last."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightlab.errors import UsageError
from weightlab.files import disk
from weightlab.files.container import MAX_HEADER, build_header, described, header_text, layout, padded_size
from weightlab.files.digest import PartDigest
from weightlab.files.disk import read_exactly
from weightlab.files.write_behind import WriteBehind
from weightlab.patches.header import KEY, Part, PatchHeader, Record, Shard, canonical
from weightlab.patches.layout import INDEX_NAME, StoredTensor, entry_name, shard_name, split
from weightlab.patches.parts import Extent, StoredParts
from weightlab.tensors.arithmetic import raw_bytes
from weightlab.tensors.spec import TensorSpec

_ANY_DIGEST = "f" * 64
_CHUNK = 2**21


class Spool:
    """A nameless temporary file for parts that are computed before their place is known."""

    def __init__(self, folder: Path) -> None:
        with disk.storage_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._path = folder / "temporary file"
        self._end = 0
        self._lock = threading.Lock()
        self._extents: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)

    def append(self, tensor: str, part: str, values: Tensor) -> None:
        raw = raw_bytes(values)
        with self._lock:
            offset = self._end
            self._end += raw.nbytes
        disk.write_at(self._file.fileno(), raw, offset, self._path)
        self._extents[tensor, part].append((offset, raw.nbytes))

    def chunks(self, tensor: str, part: str) -> Sequence[tuple[int, int]]:
        return self._extents[tensor, part]

    def read(self, offset: int, out: Tensor) -> None:
        read_exactly(self._file.fileno(), offset, out, self._path)

    def close(self) -> None:
        self._file.close()


class TensorSpool:
    """The spool as one tensor's encoder sees it."""

    def __init__(self, spool: Spool, tensor: str) -> None:
        self._spool, self._tensor = spool, tensor

    def append(self, part: str, values: Tensor) -> None:
        self._spool.append(self._tensor, part, values)


class _File:
    """One file of the patch while it is written."""

    def __init__(self, path: Path, names: Sequence[str], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.names = list(names)
        self.specs = {entry_name(n, p): s for n in names for p, s in tensors[n].fixed.items()}
        self.offsets, self.end = layout(self.specs)
        self.fd = -1
        self.header_bytes = 0


class PatchWriter:
    """Writes one patch.

    Args:
        place: the temporary file, or the temporary folder when `sharded`.
        tensors: what is stored of each tensor, in order.
        draft: the header with every number and digest still open; gives the room that headers need.
    """

    def __init__(self, place: Path, tensors: Mapping[str, StoredTensor], draft: PatchHeader, *, sharded: bool) -> None:
        groups = split(tensors, sharded=sharded)
        self._tensors = tensors
        self._files = [
            _File(place / shard_name(i, len(groups)) if sharded else place, names, tensors)
            for i, names in enumerate(groups)
        ]
        self._file_of = {name: file for file in self._files for name in file.names}
        self._sharded = sharded
        self._place = place
        self._digests: dict[tuple[str, str], PartDigest] = {}  # of parts that are being written
        self._records: dict[str, dict[str, Part]] = {}
        self._written: dict[tuple[str, str], int] = defaultdict(int)
        self._behind = WriteBehind()
        for index, file in enumerate(self._files):
            file.header_bytes = self._worst_header(file, draft, index)
            if file.header_bytes > MAX_HEADER:
                raise UsageError(
                    f"{file.path.name}: the header of one file would pass the format's {MAX_HEADER:,} bytes",
                    "give the output a name without .safetensors, so that it becomes a folder of shards",
                )

    def _worst_header(self, file: _File, draft: PatchHeader, index: int) -> int:
        """The bytes of a file's header at most: every part is there, with a digest in place of each that is open.

        They are counted tensor by tensor: of many tensors the header itself would take more memory than all else.
        """
        least = sum(spec.nbytes for spec in file.specs.values())
        growing = [stored.growing[1] for n in file.names if (stored := self._tensors[n]).growing]
        offset = file.end + least + sum(growing)
        own = self._own(draft, index)
        bare = self._metadata(draft, index, _ANY_DIGEST, {})
        size = len(header_text({}, {}, bare)) + max(0, len(own) - 1)
        for name, record in own.items():
            stored = self._tensors.get(name, StoredTensor())
            specs = dict(stored.fixed)
            if stored.growing:
                specs[stored.growing[0]] = TensorSpec(stored.growing[0], "U8", (stored.growing[1],))
            parts = {part: Part(entry=entry_name(name, part), digest=_ANY_DIGEST) for part in specs}
            text = f"{canonical(name)}:{record.model_copy(update={'parts': parts}).text()}"
            size += len(canonical(text).encode()) - 2  # as it stands in a text of JSON, without the quotes
            for part, spec in specs.items():
                size += len(f",{canonical(entry_name(name, part))}:{described(spec, offset)}".encode())
        return padded_size(size)

    def require_room(self) -> None:
        """Checks that what is certain to be written has room; what is compressed may turn out smaller than feared.

        Raises:
            StorageError: it has not.
        """
        sizes = [f.header_bytes + sum(self._tensors[n].least_bytes() for n in f.names) for f in self._files]
        disk.require_room(self._files[0].path.parent, sum(sizes), max(sizes))

    def begin(self) -> None:
        """Makes the files."""
        for file in self._files:
            file.fd = disk.create(file.path)

    def append(self, name: str, part: str, values: Tensor) -> None:
        """Writes the next values of a part. Calls for one patch come in the order of the tensors' tiles."""
        self.reserve(name, part, values)()

    def reserve(self, name: str, part: str, values: Tensor) -> Callable[[], None]:
        """The half of `append` that must come in order: takes the digest and the place; what it returns writes.

        So that threads write at the same time. `values` must stay as they are until then.
        """
        raw = raw_bytes(values)
        file = self._file_of[name]
        entry, key = entry_name(name, part), (name, part)
        spec = self._tensors[name].fixed.get(part)
        if key not in self._digests:
            self._digests[key] = PartDigest(spec.dtype if spec else "U8")
            if spec is None:
                file.offsets[entry] = file.end
        position = file.header_bytes + file.offsets[entry] + self._written[key]
        self._digests[key].update(raw)
        self._written[key] += raw.nbytes
        if spec is None:
            file.end += raw.nbytes

        def write() -> None:
            disk.write_at(file.fd, raw, position, file.path)
            self._behind.wrote(file.fd, raw.nbytes, file.path)

        return write

    def take(self, name: str, parts: Sequence[str], spool: Spool) -> None:
        """Writes parts that lie in the spool."""
        for part in parts:
            self.append(name, part, torch.empty(0, dtype=torch.uint8))
            for offset, length in spool.chunks(name, part):
                for done in range(0, length, _CHUNK):
                    raw = torch.empty(min(_CHUNK, length - done), dtype=torch.uint8)
                    spool.read(offset + done, raw)
                    self.append(name, part, raw)

    def parts(self, name: str, spec: TensorSpec, parameters: Mapping[str, object]) -> StoredParts:
        """What has been written of a tensor with fixed parts, for decoding it again."""
        file = self._file_of[name]
        extents = {
            part: Extent(file.fd, file.path, file.header_bytes + file.offsets[entry_name(name, part)], part_spec)
            for part, part_spec in self._tensors[name].fixed.items()
        }
        return StoredParts(spec, parameters, extents)

    def part_records(self, name: str) -> dict[str, Part]:
        """The header's account of a tensor's parts, once all are written; nothing more may come to them.

        Asked for early, it spares memory: a digest that goes on takes two kilobytes.
        """
        if name in self._records:
            return self._records[name]
        stored, file = self._tensors[name], self._file_of[name]
        records: dict[str, Part] = {}
        for part in (*stored.fixed, *([stored.growing[0]] if stored.growing else [])):
            self.append(name, part, torch.empty(0, dtype=torch.uint8))  # an empty part was never begun
            entry, written = entry_name(name, part), self._written.pop((name, part))
            spec = stored.fixed.get(part) or TensorSpec(part, "U8", (written,))
            if spec.nbytes != written:
                raise AssertionError(f"{entry}: {written} bytes written, {spec.nbytes} planned")
            file.specs[entry] = spec
            records[part] = Part(entry=entry, digest=self._digests.pop((name, part)).hexdigest(spec.shape))
        self._records[name] = records
        return records

    def finish(self, header: PatchHeader) -> None:
        """Writes the headers, and the index of a sharded patch; syncs everything."""
        patch_id = header.id()
        for index, file in enumerate(self._files):
            metadata = self._metadata(header, index, patch_id, self._own(header, index))
            head = build_header(file.specs, file.offsets, metadata, size=file.header_bytes)
            disk.write_at(file.fd, head, 0, file.path)
            self._behind.finish(file.fd, file.path)
        if self._sharded and len(self._files) > 1:
            weight_map = {entry: f.path.name for f in self._files for entry in f.specs}
            total = sum(s.nbytes for f in self._files for s in f.specs.values())
            content = canonical({"metadata": {"total_size": total, "weightlab_id": patch_id}, "weight_map": weight_map})
            path = self._place / INDEX_NAME
            fd = disk.create(path)
            try:
                disk.write_at(fd, content.encode(), 0, path)
            finally:
                os.close(fd)
        self._behind.wait()

    def close(self) -> None:
        self._behind.close()
        for file in self._files:
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1

    def _own(self, header: PatchHeader, index: int) -> dict[str, Record]:
        """What one file's header tells of; tensors without stored parts (removed ones) belong to the first."""
        if len(self._files) == 1:
            return header.tensors
        own = {n: header.tensors[n] for n in self._files[index].names}
        return own | ({n: r for n, r in header.tensors.items() if n not in self._file_of} if index == 0 else {})

    def _metadata(
        self, header: PatchHeader, index: int, patch_id: str, tensors: Mapping[str, Record]
    ) -> dict[str, str]:
        count = len(self._files)
        shard = Shard(index=index, count=count, id=patch_id) if count > 1 else header.shard
        own = header.model_copy(update={"tensors": dict(tensors), "shard": shard})
        return {"format": "pt", KEY: own.text()}
