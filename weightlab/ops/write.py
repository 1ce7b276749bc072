"""Writing a checkpoint with patches on it to a new place: only touched tensors are computed, the rest is copied.

Every offset is known before the first byte, so threads read, compute, copy and write at the same time. A file gets its
header last, and the folder its name when everything in it is on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from weightlab.files import disk
from weightlab.files.digest import Turns, tensor_hasher
from weightlab.files.write_behind import WriteBehind
from weightlab.ops.companions import make_parents
from weightlab.ops.output_files import OutputFile
from weightlab.patches.compute import Offences, check_result, compute_tile, read_clean
from weightlab.patches.fit import Fit, Target
from weightlab.sources import Source
from weightlab.sources.local import LocalSource
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Progress, run
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace

_CHUNK = 2**23


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
