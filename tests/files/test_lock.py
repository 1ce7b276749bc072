"""One writer, many readers, across processes."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightlab.errors import BusyError, NotPatchableError
from weightlab.files.lock import folder_lock

HOLD = """
import sys, time
from pathlib import Path
from weightlab.files.lock import folder_lock
with folder_lock(Path(sys.argv[1]), exclusive=sys.argv[2] == "writer"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def held(folder: Path, by: str, seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(folder), by, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("holder", "exclusive", "free"),
    [("writer", True, False), ("writer", False, False), ("reader", True, False), ("reader", False, True)],
)
def test_who_excludes_whom(tmp_path: Path, holder: str, exclusive: bool, free: bool) -> None:
    with held(tmp_path, holder):
        if free:
            with folder_lock(tmp_path, exclusive=exclusive):
                return
        with (
            pytest.raises(BusyError, match="in use by another process") as failed,
            folder_lock(tmp_path, exclusive=exclusive),
        ):
            pytest.fail("two held it at once")
        assert failed.value.exit_code == 6


def test_waiting(tmp_path: Path) -> None:
    with held(tmp_path, "writer", 0.4), folder_lock(tmp_path, exclusive=True, wait=30):
        pass
    with held(tmp_path, "writer"), pytest.raises(BusyError), folder_lock(tmp_path, exclusive=True, wait=0.2):
        pytest.fail("two held it at once")


def test_it_ends_with_the_process_however_that_ends(tmp_path: Path) -> None:
    with held(tmp_path, "writer") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder_lock(tmp_path, exclusive=True):
            assert list(tmp_path.iterdir()) == []  # it leaves no file


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with folder_lock(tmp_path, exclusive=False):
        pass
    with pytest.raises(NotPatchableError, match="no working locks"), folder_lock(tmp_path, exclusive=True):
        pytest.fail("a writer went on without a lock")
