"""Writing a checkpoint with patches on it to a new place: only touched tensors are computed, the rest is copied.

Every offset is known before the first byte, so threads read, compute, copy and write at the same time. A file gets its
header last, and the folder its name when everything in it is on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import torch

from weightlab.errors import MisfitError, UsageError
from weightlab.files import disk
from weightlab.files.container import build_header, layout
from weightlab.files.digest import Turns, tensor_hasher
from weightlab.files.write_behind import WriteBehind
from weightlab.ops.companions import make_parents
from weightlab.patches.compute import Offences, check_result, compute_tile, read_clean
from weightlab.patches.fit import Fit, Target
from weightlab.sources import Source
from weightlab.sources.local import LocalSource
from weightlab.sources.parts import PartsSource
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Progress, run
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace

_CHUNK = 2**23
SINGLE = "model.safetensors"
PIPELINE_PART = "diffusion_pytorch_model.safetensors"
"""What diffusers calls its own networks in a pipeline."""


@dataclass(slots=True)
class OutputFile:
    """One file of the new checkpoint.

    Attributes:
        head: all bytes before the tensors.
        places: {name: absolute offset} of every tensor in it.
        specs: what lies there.
        source: the file it comes from; None where there is none (a pickle, a state dict).
        pending: tasks that are not done.
    """

    name: str
    head: bytes | bytearray
    places: dict[str, int]
    specs: dict[str, TensorSpec]
    source: str | None
    pending: int = 0
    fd: int = -1
    path: Path = field(default_factory=Path)

    @property
    def size(self) -> int:
        return len(self.head) + sum(s.nbytes for s in self.specs.values())


@dataclass(frozen=True, slots=True)
class _Task:
    """A piece of a file: a tile of a touched tensor, bytes of a tensor read through its source, or a range copied."""

    file: OutputFile
    kind: str
    offset: int
    count: int
    start: int = 0
    stop: int = 0
    name: str = ""
    turn: int = -1


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes computed, and bytes copied as they are."""

    computed: int
    copied: int


def plan_files(source: Source, clean: Source, fit: Fit, single: str | None) -> list[OutputFile]:
    """What the new checkpoint's files are: those of the old one, with safetensors in the place of pickles.

    Added tensors go to the last file of their part; a file that loses all its tensors is left out.

    Args:
        source: the checkpoint as it lies on the disk; `clean`: the same without patches.
        single: the name of the file where there is but one; None: its own.

    Raises:
        UsageError: nothing would be left.
        MisfitError: lists added tensors that belong to no part of the model.
    """
    results = {n: t.result for n, t in fit.targets.items() if t.mode != "remove"}
    gone = {n for n, t in fit.targets.items() if t.mode == "remove"}
    local = local_part(source)
    old = _files_of(source, clean)
    last = {_prefix(name): name for name in old}
    added: dict[str, dict[str, TensorSpec]] = {name: {} for name in old}
    homeless: list[str] = []
    for name, spec in results.items():
        if name not in clean.specs:
            prefix = max((p for p in last if name.startswith(p)), key=len, default=None)
            if prefix is None:
                homeless.append(str(spec))
            else:
                added[last[prefix]][name] = spec
    if homeless:
        raise MisfitError("these tensors would belong to no part of the model", "leave them out", homeless)
    files: list[OutputFile] = []
    for name, (specs, metadata) in old.items():
        new = {n: results.get(n, s) for n, s in specs.items() if n not in gone} | added[name]
        own = local is not None and name in local.headers
        if own and new == specs and name not in local.fuller:  # type: ignore[union-attr]
            assert local is not None
            header = local.headers[name]
            head = os.pread(local.descriptor(name), header.data_start, 0)
            files.append(OutputFile(name, head, {n: e.offset for n, e in header.entries.items()}, specs, name))
        elif new:
            files.append(_built(name, new, metadata, name if own else None))
    if not files:
        raise UsageError("nothing would be left of the checkpoint", "leave some tensors in it with --exclude")
    if single is not None:
        files[0].name = single
    return files


def local_part(source: Source) -> LocalSource | None:
    """What of a model is safetensors on the disk."""
    return source if isinstance(source, LocalSource) else source.local if isinstance(source, PartsSource) else None


_Old: TypeAlias = tuple[dict[str, TensorSpec], Mapping[str, str]]


def _files_of(source: Source, clean: Source) -> dict[str, _Old]:
    """{file of the new checkpoint: (tensors in it, metadata)}, before any patch."""
    local = local_part(source)
    files: dict[str, _Old] = {}
    for name, header in ({} if local is None else local.headers).items():
        files[name] = {n: e.spec for n, e in header.entries.items()}, header.metadata
    if isinstance(source, PartsSource):
        for folder, pickle in source.pickles.items():
            prefix = f"{folder}/" if folder else ""
            usual = PIPELINE_PART if any(PIPELINE_PART.split(".")[0] in f for f in pickle.files) else SINGLE
            specs = {prefix + n: clean.specs[prefix + n] for n in pickle.specs}
            files[prefix + usual] = specs, {"format": "pt", **pickle.aliases}
    elif local is None:
        files[SINGLE] = dict(clean.specs), {"format": "pt", **clean.aliases}
    return files


def _prefix(name: str) -> str:
    """The beginning of the names of tensors in a file: its folder and `/`."""
    folder, sign, _ = name.rpartition("/")
    return folder + sign


def _built(name: str, specs: dict[str, TensorSpec], metadata: Mapping[str, str], source: str | None) -> OutputFile:
    begin = len(_prefix(name))
    own = {n[begin:]: s for n, s in specs.items()}
    offsets, _ = layout(own)
    head = build_header(own, offsets, metadata)
    return OutputFile(name, head, {n: len(head) + offsets[n[begin:]] for n in specs}, specs, source)


def index_content(name: str, index: Mapping[str, Any], files: list[OutputFile]) -> bytes:
    """An index of the new checkpoint: the old one's other entries, names, and total size.

    Args:
        name: of the index; it is about the files in its folder.
    """
    prefix = _prefix(name)
    mine = [f for f in files if _prefix(f.name) == prefix]
    metadata = index.get("metadata")
    total = sum(s.nbytes for f in mine for s in f.specs.values())
    tree = dict(index)
    tree["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    begin = len(prefix)
    tree["weight_map"] = {n[begin:]: f.name[begin:] for f in mine for n in sorted(f.specs)}
    return (json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_files(
    folder: Path,
    files: list[OutputFile],
    disk_source: LocalSource | None,
    clean: Source,
    fit: Fit,
    options: ChangeOptions,
) -> Written:
    """Writes all files of a plan into `folder` (a temporary one).

    Raises:
        NonFiniteError, RangeError: lists every tensor whose result cannot be stored.
        IntegrityError: an exact patch did not give what it promises.
    """
    return _Writer(folder, files, disk_source, clean, fit, options).write()


class _Writer:
    def __init__(
        self,
        folder: Path,
        files: list[OutputFile],
        disk_source: LocalSource | None,
        clean: Source,
        fit: Fit,
        options: ChangeOptions,
    ) -> None:
        self._files, self._disk, self._clean, self._fit = files, disk_source, clean, fit
        self._resources, self._allow = options.resources, options.allow_nonfinite
        self._turns, self._offences, self._lock = Turns(), Offences(), Lock()
        self._hashers = {
            n: tensor_hasher(t.result.dtype, t.result.shape)
            for n, t in fit.targets.items()
            if t.result_digest is not None
        }
        self._behind = WriteBehind()
        self.computed = self.copied = 0
        self._folder = folder
        for file in files:
            file.path = folder / file.name

    def write(self) -> Written:
        tasks = list(self._tasks())
        for task in tasks:
            task.file.pending += 1
        progress = Progress(sum(f.size for f in self._files), self._resources.progress)

        def work(task: _Task, workspace: Workspace) -> None:
            self._do(task, workspace)
            self._behind.wrote(task.file.fd, task.count, task.file.path)
            progress.advance(task.count)
            with self._lock:
                task.file.pending -= 1
                done = task.file.pending == 0
            if done:
                self._finish(task.file)

        try:
            for file in self._files:
                make_parents(self._folder, Path(file.name))
                file.fd = disk.create(file.path)
                if file.pending == 0:  # a file without a byte of tensors
                    self._finish(file)
            run(tasks, work, self._resources, self._turns)
            self._offences.raise_any()
            for name, hasher in self._hashers.items():
                check_result(self._fit.targets[name], hasher.hexdigest())
            self._behind.wait()
        finally:
            self._behind.close()
            for file in self._files:
                if file.fd >= 0:
                    os.close(file.fd)
                    file.fd = -1
        return Written(self.computed, self.copied)

    def _finish(self, file: OutputFile) -> None:
        """The header, last."""
        disk.write_at(file.fd, file.head, 0, file.path)
        self._behind.finish(file.fd, file.path)

    def _tasks(self) -> Iterator[_Task]:
        turn = 0
        for file in self._files:
            run_from = run_to = run_at = -1  # bytes to copy that lie together in both files
            for name in sorted(file.specs, key=file.places.__getitem__):
                spec, place = file.specs[name], file.places[name]
                target = self._fit.targets.get(name)
                if target is None and self._disk is not None and file.source is not None:
                    begin = self._disk.entry(name).offset
                    if begin != run_to or place - run_at != begin - run_from:
                        yield from _copies(file, run_from, run_to, run_at)
                        run_from, run_at = begin, place
                    run_to = begin + spec.nbytes
                    continue
                size = spec.stored.type.itemsize
                for start, stop in tiles(spec.stored.numel):
                    count = (stop - start) * size
                    if target is None:
                        yield _Task(file, "read", place + start * size, count, start * size, name=name)
                        continue
                    hashed = name in self._hashers
                    yield _Task(file, "tile", place + start * size, count, start, stop, name, turn if hashed else -1)
                    turn += hashed
            yield from _copies(file, run_from, run_to, run_at)

    def _do(self, task: _Task, workspace: Workspace) -> None:
        file = task.file
        if task.kind == "copy":
            assert self._disk is not None and file.source is not None
            source = self._disk.descriptor(file.source)
            disk.copy_range(source, task.start, file.fd, task.offset, task.count, file.path)
            with self._lock:
                self.copied += task.count
            return
        if task.kind == "read":
            raw = workspace.buffer("clean", task.count, torch.uint8)
            self._clean.read(task.name, task.start, raw)
            disk.write_at(file.fd, raw.numpy(), task.offset, file.path)
            with self._lock:
                self.copied += task.count
            return
        target: Target = self._fit.targets[task.name]
        clean = read_clean(self._clean, target, task.start, task.stop, workspace)
        result = compute_tile(target, task.start, task.stop, clean, workspace, self._offences, self._allow)
        disk.write_at(file.fd, result.numpy(), task.offset, file.path)
        with self._lock:
            self.computed += task.count
        if task.turn >= 0:
            with self._turns.turn(task.turn):
                self._hashers[task.name].update(result.numpy().data)


def _copies(file: OutputFile, start: int, stop: int, offset: int) -> Iterator[_Task]:
    for position in range(start, stop, _CHUNK):
        count = min(_CHUNK, stop - position)
        yield _Task(file, "copy", offset + position - start, count, position)
