"""Output is whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightlab.errors import NotPatchableError, StorageError
from weightlab.files.atomic import atomic_file, atomic_folder, replace_file

Make = Callable[[Path], None]


def write_file(place: Path) -> None:
    with atomic_file(place) as temporary:
        temporary.write_text("whole")


def write_folder(place: Path) -> None:
    with atomic_folder(place) as temporary:
        (temporary / "inside").write_text("whole")


BOTH = pytest.mark.parametrize("write", [write_file, write_folder])


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@BOTH
def test_it_appears_at_the_end_and_leaves_nothing_beside_it(tmp_path: Path, write: Make) -> None:
    write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as file, atomic_folder(tmp_path / "folder") as folder:
        file.write_text("half")
        (folder / "inside").write_text("half")
        assert all(".partial" in str(p.relative_to(tmp_path)) for p in tmp_path.iterdir())
        assert not (tmp_path / "file").exists() and not (tmp_path / "folder").exists()


def broken_off_file(place: Path, error: type[BaseException], *, overwrite: bool = False) -> None:
    with atomic_file(place, overwrite=overwrite) as temporary:
        temporary.write_text("half")
        raise error


def broken_off_folder(place: Path, error: type[BaseException]) -> None:
    with atomic_folder(place) as temporary:
        (temporary / "inside").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("broken_off", [broken_off_file, broken_off_folder])
def test_an_error_leaves_nothing(
    tmp_path: Path, broken_off: Callable[[Path, type[BaseException]], None], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        broken_off(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.write_text("before")
    with pytest.raises(ValueError):
        broken_off_file(place, ValueError, overwrite=True)
    assert place.read_text() == "before"
    with atomic_file(place, overwrite=True) as temporary:
        temporary.write_text("after")
    assert place.read_text() == "after"


@BOTH
def test_what_is_there_is_refused_before_any_work(tmp_path: Path, write: Make) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(NotPatchableError, match="exists already"):
            write(tmp_path / name)
    with pytest.raises(StorageError, match="no such folder"):
        write(tmp_path / "no" / "where")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_an_empty_folder_is_taken_for_a_folder_only(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out")
    assert (tmp_path / "out" / "inside").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotPatchableError, match="is a folder"):
        write_file(tmp_path / "empty")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_are_those_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_file(tmp_path / "out")
        write_folder(tmp_path / "folder")
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out") as slow:
        slow.write_text("first")
        write_file(tmp_path / "out")  # a second run to the same place is done before
        assert (tmp_path / "out").read_text() == "whole"
        assert slow.read_text() == "first"
    assert (tmp_path / "out").read_text() == "first"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom weightlab.files.atomic import atomic_file, atomic_folder\n"
        f"place = Path({str(tmp_path)!r})\n"
        "with atomic_file(place / 'file[1]') as a, atomic_folder(place / 'folder') as b:\n"
        "    a.write_text('half')\n    (b / 'x').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    write_file(tmp_path / "file[1]")
    write_folder(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file[1]", "folder"]


def test_replace_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(tmp_path / "state", b"one")
    replace_file(tmp_path / "state", b"two")
    assert (tmp_path / "state").read_bytes() == b"two"

    def failing(*_: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError, match=r"[Ii]nput/output"):
        replace_file(tmp_path / "state", b"three")
    assert (tmp_path / "state").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@BOTH
@pytest.mark.parametrize("name", ["a\0b", "caf\udce9", "\ud800"])
def test_names_that_no_reader_could_open(tmp_path: Path, write: Make, name: str) -> None:
    with pytest.raises(StorageError, match="no path for output"):
        write(tmp_path / name)
    with pytest.raises(StorageError, match="no path for output"):
        write(tmp_path / name / "x")
    assert not list(tmp_path.iterdir())
