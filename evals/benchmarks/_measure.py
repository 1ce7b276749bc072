"""Runs a command and says what it cost: wall time, peak memory of its process tree, bytes moved.

Linux only: the numbers come from /proc.
"""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.02
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Cost:
    """What one run of a command cost.

    Attributes:
        seconds: Wall time from start to exit.
        sync_seconds: How long it took after that to bring what was written to the disk.
        peak_bytes: Peak resident memory; file pages that the processes map count in it.
        peak_anonymous_bytes: The same without mapped file pages; polled, so a short peak can escape it.
        read_calls_bytes, written_calls_bytes: What went through read and write calls, cached or not.
        read_disk_bytes, written_disk_bytes: What came from, and is bound for, the disk (dirtied pages).
        processor_seconds: User and system time of the tree.
        exit_code, output: How it ended, and the end of what it printed.
    """

    seconds: float
    sync_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    read_calls_bytes: int
    written_calls_bytes: int
    read_disk_bytes: int
    written_disk_bytes: int
    processor_seconds: float
    exit_code: int
    output: str

    @property
    def written_bytes(self) -> int:
        """The larger count: mapped writes escape the calls, and a clone of extents dirties no page."""
        return max(self.written_calls_bytes, self.written_disk_bytes)


class _Sampler(threading.Thread):
    """Polls the memory of a process and of all that it starts."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.peak_anonymous = 0
        self._process = process
        self._done = threading.Event()

    def run(self) -> None:
        while True:
            self._sample()
            if self._done.wait(_POLL_SECONDS):
                return

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _sample(self) -> None:
        resident = anonymous = 0
        for process in _tree(self._process):
            status = fields(f"/proc/{process}/status")
            resident += status.get("VmRSS", 0)
            anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            # The high-water mark is the kernel's own, so a peak between two polls is not lost.
            self.peak = max(self.peak, status.get("VmHWM", 0) * 1024)
        self.peak = max(self.peak, resident * 1024)
        self.peak_anonymous = max(self.peak_anonymous, anonymous * 1024)


def measure(command: Sequence[str], written_to: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Runs `command` to its end; `written_to` names a path on the file system that is synced afterwards.

    The bytes are read off the process after it has ended and before it is reaped: at that moment the
    kernel's counts are complete and hold those of the children that it has waited for.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            seconds = time.perf_counter() - start
            sampler.stop()
        transferred = fields(f"/proc/{process.pid}/io")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, so Popen must not look for it
        output.seek(0)
        text = output.read().decode(errors="replace")
    start = time.perf_counter()
    sync(written_to)
    sync_seconds = time.perf_counter() - start
    return Cost(
        seconds=seconds,
        sync_seconds=sync_seconds,
        peak_bytes=max(sampler.peak, _reported_peak(usage)),
        peak_anonymous_bytes=sampler.peak_anonymous,
        read_calls_bytes=transferred.get("rchar", 0),
        written_calls_bytes=transferred.get("wchar", 0),
        read_disk_bytes=transferred.get("read_bytes", 0),
        written_disk_bytes=transferred.get("write_bytes", 0),
        processor_seconds=usage.ru_utime + usage.ru_stime,
        exit_code=process.returncode,
        output=text[-_TAIL_CHARACTERS:],
    )


def sync(path: Path) -> None:
    """Brings all that is dirty on the file system of `path` to the disk."""
    while not path.exists():
        path = path.parent
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Python has no call for it; os.sync would also wait for every other disk.
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(path))
    finally:
        os.close(descriptor)


def warm(paths: Iterable[Path]) -> None:
    """Reads files, and the files of folders, once, so that they lie in the page cache."""
    buffer = bytearray(2**22)
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb", buffering=0) as opened:
                    while opened.readinto(buffer):
                        pass


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _reported_peak(usage: resource.struct_rusage) -> int:
    """The kernel's peak for the largest process of the tree, or 0 where it may be our own.

    Between fork and exec the child is a copy of this process, and that counts; a smaller value says nothing.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage.ru_maxrss * 1024 if usage.ru_maxrss > own else 0


def _tree(process: int) -> list[int]:
    """The process and its living descendants; it alone where the kernel keeps no list of children."""
    found = [process]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        except OSError:
            continue  # it has ended
    return found


def fields(path: str) -> dict[str, int]:
    """The lines `name: number [unit]` of a file of /proc; empty when the process has gone."""
    found = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[name] = int(number[0])
    return found
