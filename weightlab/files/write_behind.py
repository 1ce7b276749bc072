"""Bringing bytes to the disk while more are being computed, so that the sync at the end has little left to do."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from weightlab.files import disk

_STEP = 2**26


class WriteBehind:
    """One thread that syncs files while others write them.

    Early syncs are a hint to the disk and no step of any order of writes; `finish` is a sync of all that was written
    before it. An error of either is raised by `wait`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._lock = Lock()
        self._written = 0
        self._early: Future[None] | None = None
        self._all: list[Future[None]] = []

    def wrote(self, fd: int, count: int, path: Path) -> None:
        """Takes note of bytes written; now and then an early sync of their file begins."""
        with self._lock:
            self._written += count
            if self._written < _STEP or not (self._early is None or self._early.done()):
                return
            self._written = 0
            self._early = self._pool.submit(disk.sync_early, fd, path)
            self._all.append(self._early)

    def finish(self, fd: int, path: Path) -> None:
        """Begins the sync of a file that is complete."""
        with self._lock:
            self._all.append(self._pool.submit(disk.sync_file, fd, path))

    def wait(self) -> None:
        """Waits until everything so far is on the disk.

        Raises:
            StorageError: a sync failed; it is not tried again.
        """
        for sync in self._all:
            sync.result()

    def close(self) -> None:
        """Ends the thread; after that descriptors can be closed."""
        self._pool.shutdown(cancel_futures=True)
