"""Runs one function over many tiles on worker threads.

The result does not depend on the number of threads: a tile's arithmetic is its own, and what must happen in order
(digests, appending) takes turns. torch's own threads are switched off while tiles run, in the workers only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from weightlab.errors import UsageError
from weightlab.files.digest import Aborted, Turns
from weightlab.tensors.workspace import Workspace

# Threads that do short tasks wait for one another's interpreter more than they work: on 40,000 tensors of 64 elements
# two took longer than one. So one works alone for as long as tasks are short (seconds, each); it is looked at so often.
_SHORT, _GLANCE = 0.001, 0.003
Task = TypeVar("Task")
DEFAULT_MEMORY = 512 * 2**20
_INTERPRETER = 288 * 2**20  # measured: python, torch and the other imports
_PER_ELEMENT = 50  # measured: of a matrix that is factorised, 17 to 23 bytes by rank and 47 to 49 by energy
_MATRICES = 256 * 2**20  # for each thread, where no budget was given
_PER_THREAD = 40 * 2**20  # measured: buffers of fp32 and storage tiles, decoder temporaries


@dataclass(slots=True)
class Progress:
    """Counts bytes done; `report` is called with (done, total) from worker threads."""

    total: int = 0
    report: Callable[[int, int], None] | None = None
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self.report is not None:
                self.report(self.done, self.total)


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        threads: worker threads; None: one a core, at most 8.
        memory: bytes the process should stay below, the interpreter included. None: `DEFAULT_MEMORY`, and more where
            a step needs a whole matrix, or many inputs at a time.
        device: where arithmetic runs: "cpu", or an accelerator such as "cuda".
        progress: called with (bytes done, bytes in all).
    """

    threads: int | None = None
    memory: int | None = None
    device: str = "cpu"
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Raises:
        UsageError: arithmetic cannot run on that device.
        """
        if self.device == "cpu":
            return
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--device {self.device} cannot be used: {reason}", "leave it out, for cpu") from error

    def expected_memory(self) -> int:
        """Bytes that the interpreter and the tiles take at most; a step that needs a whole matrix takes more."""
        return _INTERPRETER + self.workers() * _PER_THREAD

    def workers(self, more: int = 0) -> int:
        """Threads that fit the memory budget.

        Args:
            more: bytes that each takes beyond the usual.

        Raises:
            UsageError: not even one fits.
        """
        memory = DEFAULT_MEMORY if self.memory is None else self.memory
        fitting = (memory - _INTERPRETER) // (_PER_THREAD + more)
        if self.memory is None:
            fitting = max(1, fitting)
        if fitting < 1:
            least = -(-(_INTERPRETER + _PER_THREAD + more) // 2**20)
            raise UsageError(f"--memory {memory // 2**20}M is too small", f"give at least {least}M")
        wanted = self.threads if self.threads is not None else min(8, len(os.sched_getaffinity(0)))
        if wanted < 1:
            raise UsageError(f"--threads {wanted} makes no sense", "give 1 or more")
        return min(wanted, fitting)

    def room_for_matrices(self) -> Room:
        """Room for elements: a step that needs whole matrices has as many at a time as fit."""
        workers = self.workers()
        left = workers * _MATRICES if self.memory is None else self.memory - _INTERPRETER - workers * _PER_THREAD
        return Room(left // _PER_ELEMENT)

    def require_matrix(self, numel: int, name: str) -> None:
        """Checks that a step which needs a whole matrix fits, where the budget was set below its need.

        Raises:
            UsageError: names the tensor and what it needs.
        """
        needed = _INTERPRETER + numel * _PER_ELEMENT
        if self.memory is not None and needed > self.memory:
            raise UsageError(
                f"{name}: factorising it needs about {needed // 2**20}M",
                "give more --memory, or another encoding for it",
            )


class Room:
    """Lets threads in while what they hold together fits; who does not fit beside others goes alone, in turn.

    Args:
        size: how much that is, in any unit.
    """

    def __init__(self, size: int) -> None:
        self.size, self._taken = size, 0
        self._entry, self._left = threading.Lock(), threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Waits until there is room, and has it for the length of a block."""
        with self._entry, self._left:  # one waits at the door, so that no one overtakes who needs much
            self._left.wait_for(lambda: not self._taken or self._taken + size <= self.size)
            self._taken += size
        try:
            yield
        finally:
            with self._left:
                self._taken -= size
                self._left.notify_all()


class _Feed(Generic[Task]):
    """Hands out tasks in order to many threads, until one fails."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks: Iterator[Task] = iter(tasks)
        self._lock = threading.Lock()
        self.stopped = False
        self.given = 0

    def __iter__(self) -> Iterator[Task]:
        while True:
            with self._lock:
                if self.stopped:
                    return
                try:
                    task = next(self._tasks)
                except StopIteration:
                    return
                self.given += 1
            yield task


def run(
    tasks: Iterable[Task],
    work: Callable[[Task, Workspace], None],
    resources: Resources,
    turns: Turns | None = None,
    *,
    more: int = 0,
) -> None:
    """Runs `work(task, workspace)` for every task, tasks begun in order.

    Args:
        turns: what `work` waits on; aborted when a thread fails, so that no one waits for ever.
        more: bytes that each thread takes beyond the usual.

    Raises:
        the first error that a thread met; the other threads end at their next tile.
    """
    feed = _Feed(tasks)
    errors: list[BaseException] = []

    together = threading.Event()

    def loop(first: bool) -> None:
        if not first:
            together.wait()
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)  # of this thread alone; one that the caller has set would be inherited
        workspace = Workspace(resources.device)
        try:
            with torch.no_grad():
                for task in feed:
                    work(task, workspace)
        except Aborted:
            return
        except BaseException as error:  # handed to the caller's thread, where it is raised
            errors.append(error)
            feed.stopped = True
            if turns is not None:
                turns.abort()

    before = torch.get_num_threads()
    count = resources.workers(more)
    threads = [threading.Thread(target=loop, args=(not index,), daemon=True) for index in range(count)]
    try:
        for thread in threads:
            thread.start()
        given = 0
        while threads[0].is_alive() and count > 1:
            threads[0].join(_GLANCE)
            if feed.given - given < _GLANCE / _SHORT:
                break
            given = feed.given
        together.set()
        for thread in threads:
            while thread.is_alive():  # a join without a limit would not let a signal through
                thread.join(0.1)
    finally:
        feed.stopped = True
        together.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(before)
    if errors:
        raise errors[0]
