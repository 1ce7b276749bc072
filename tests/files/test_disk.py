"""System calls that do less than asked, or fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightlab.errors import IntegrityError, StorageError
from weightlab.files import disk
from weightlab.files.write_behind import WriteBehind


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:3], offset))
    fd = disk.create(tmp_path / "x")
    disk.write_at(fd, b"0123456789", 5, tmp_path / "x")
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == bytes(5) + b"0123456789"


def test_short_reads_are_continued_and_an_early_end_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:7]], offset))
    out = torch.empty(90, dtype=torch.uint8)
    disk.read_exactly(fd, 10, out, tmp_path / "x")
    assert out.tolist() == list(range(10, 100))
    with pytest.raises(IntegrityError, match="ends at byte 100"):
        disk.read_exactly(fd, 11, out, tmp_path / "x")
    os.close(fd)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "file size limit"),
        (errno.EROFS, "ead-only"),
    ],
)
def test_errors_say_what_it_is_and_which_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    fd = disk.create(tmp_path / "x")
    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StorageError, match=says) as failed:
        disk.write_at(fd, b"x", 0, tmp_path / "x")
    os.close(fd)
    assert failed.value.exit_code == 7 and str(tmp_path / "x") in failed.value.message and failed.value.remedy


def test_a_failed_sync_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "input/output error")

    fd = disk.create(tmp_path / "x")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StorageError):
        disk.sync_file(fd, tmp_path / "x")
    os.close(fd)
    assert len(calls) == 1


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
def test_copies_without_the_kernels_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "x").write_bytes(os.urandom(100_000))

    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", failing)
    assert disk.copy_file(tmp_path / "x", tmp_path / "y") == 100_000
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    source, fd = os.open(tmp_path / "x", os.O_RDONLY), disk.create(tmp_path / "y")
    with pytest.raises(StorageError, match="ended early"):
        disk.copy_range(source, 0, fd, 0, 11, tmp_path / "y")
    os.close(source)
    os.close(fd)


def test_what_is_there_is_not_written_over_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(StorageError):
        disk.create(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(StorageError):
        disk.open_existing(tmp_path / "link")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_second_name_is_of_the_file_and_not_of_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    (tmp_path / "link").symlink_to("x")
    assert disk.hard_link(tmp_path / "link", tmp_path / "second")
    assert not (tmp_path / "second").is_symlink() and (tmp_path / "x").stat().st_nlink == 2


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="bytes are needed") as failed:
        disk.require_room(tmp_path, 2**60, 0)
    assert "1,152,921,504,606,846,976" in failed.value.message
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom weightlab.errors import StorageError\n"
        "from weightlab.files.disk import require_room\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"place = Path({str(tmp_path)!r})\nrequire_room(place, 5000, 1000)\n"
        "try:\n    require_room(place, 5000, 1001)\nexcept StorageError as error:\n    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "limit of 1,000" in done.stdout


def test_syncs_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightlab.files.write_behind._STEP", 10)
    early: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (early.append(fd), real(fd))[1])
    fd, behind = disk.create(tmp_path / "x"), WriteBehind()
    for position in range(5):
        disk.write_at(fd, bytes(10), 10 * position, tmp_path / "x")
        behind.wrote(fd, 10, tmp_path / "x")
    behind.finish(fd, tmp_path / "x")
    behind.wait()
    behind.close()
    os.close(fd)
    assert early and set(early) == {fd}


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_sync_that_fails_in_the_background_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("weightlab.files.write_behind._STEP", 10)
    monkeypatch.setattr(os, call, failing)
    fd, behind = disk.create(tmp_path / "x"), WriteBehind()
    disk.write_at(fd, bytes(10), 0, tmp_path / "x")
    behind.wrote(fd, 10, tmp_path / "x")
    behind.finish(fd, tmp_path / "x")
    with pytest.raises(StorageError, match="the disk is full"):
        behind.wait()
    behind.close()
    os.close(fd)
