"""Temporary folders: which are ours is proven, and what a killed run leaves is removed by the next."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from weightlab.errors import NotPatchableError, StorageError
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder, replace_file
from weightlab.files.temporary import fitting, temporary_folder


def write_file(place: Path) -> None:
    with atomic_file(place) as temporary:
        fd = disk.create(temporary)
        disk.write_at(fd, b"whole", 0, temporary)
        os.close(fd)


def write_folder(place: Path) -> None:
    with atomic_folder(place) as temporary:
        write_file(temporary / "inside")


BOTH = pytest.mark.parametrize("write", [write_file, write_folder])
Make = Callable[[Path], None]


def killed_at(count: int, action: Callable[[], None]) -> bool:
    """Does it in a child that is killed after so many operations; False: it came to its end before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def observe(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

        disk.observer = observe
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@BOTH
def test_a_kill_after_any_operation(tmp_path: Path, write: Make) -> None:
    count = 1
    while killed_at(count, lambda: write(tmp_path / "out")):
        place = tmp_path / "out"
        if place.exists():
            assert (place if write is write_file else place / "inside").read_bytes() == b"whole"
            with pytest.raises(NotPatchableError, match="exists already"):
                write(place)
            assert [p.name for p in tmp_path.iterdir()] == ["out"], count
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        write(place)
        assert [p.name for p in tmp_path.iterdir()] == ["out"], count
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        count += 1
    assert count > 8


def by_hand(path: Path, *, folder: bool = True) -> Path:
    """Something of another program's with a name of the same form."""
    theirs = path.with_name(f".{path.name}.0123abcd.partial")
    if folder:
        theirs.mkdir()
        (theirs / "download").write_text("mine")
    else:
        theirs.write_text("mine")
    return theirs


@BOTH
def test_what_others_made_stays(tmp_path: Path, write: Make) -> None:
    place = tmp_path / "out"
    theirs = by_hand(place)
    (theirs / f"weightlab-{theirs.stat().st_ino + 1}").touch()
    file = by_hand(tmp_path / "x", folder=False).rename(tmp_path / ".out.1123abcd.partial")
    link = tmp_path / ".out.2123abcd.partial"
    link.symlink_to(theirs)
    os.mkfifo(tmp_path / ".out.3123abcd.partial")
    others = [tmp_path / name for name in (".out.tar.partial", ".out.0123abcd.partial.x", ".out2.0123abcd.partial")]
    for other in others:
        other.mkdir()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    write(place)
    found = sorted(p.name for p in tmp_path.rglob("*"))
    assert [n for n in found if n not in ("out", "inside")] == before
    assert file.read_text() == "mine" and link.is_symlink() and (theirs / "download").read_text() == "mine"


def test_a_copy_of_a_temporary_folder_is_not_ours(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "out") as ours:
        shutil.copytree(ours, tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / ".out.0123abcd.partial")
    write_file(tmp_path / "out")
    assert (tmp_path / ".out.0123abcd.partial").is_dir()
    assert len(list((tmp_path / ".out.0123abcd.partial").iterdir())) == 1  # the mark is there, of another folder


def test_links_in_one_that_was_left_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "x").write_text("mine")
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / f"weightlab-{left.stat().st_ino}").touch()
    (left / "link").symlink_to(tmp_path / "victim")
    (left / "sub").mkdir()
    (left / "sub" / "link").symlink_to(tmp_path / "victim" / "x")
    write_file(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "victim"]
    assert (tmp_path / "victim" / "x").read_text() == "mine"


def test_one_that_another_run_uses_stays(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "out") as used:
        write_file(tmp_path / "out")
        assert used.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@BOTH
@pytest.mark.parametrize("length", [200, 236, 237, 238, 254, 255])
def test_names_up_to_the_longest(tmp_path: Path, write: Make, length: int) -> None:
    place = tmp_path / ("k" * length)
    write(place)
    assert [p.name for p in tmp_path.iterdir()] == [place.name]
    if write is write_file:
        replace_file(place, b"other")
        assert place.read_bytes() == b"other"
    with pytest.raises(StorageError):
        write(tmp_path / ("k" * 256))
    assert [p.name for p in tmp_path.iterdir()] == [place.name]


def test_what_is_left_of_a_long_name_is_removed(tmp_path: Path) -> None:
    place = tmp_path / ("é" * 127)
    assert killed_at(4, lambda: write_file(place))
    other = tmp_path / ("é" * 126 + "a")
    assert killed_at(4, lambda: write_file(other))
    assert len(list(tmp_path.iterdir())) == 2
    write_file(place)
    assert len(list(tmp_path.iterdir())) == 2  # that of the other name is not touched
    write_file(other)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([place.name, other.name])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("a", ".", ".stack"), ("k" * 249, "", ".stack"), ("k" * 250, "", ".stack"), ("é" * 127, ".", ".0123.partial")],
)
def test_fitting(name: str, before: str, after: str) -> None:
    made = fitting(name, before=before, after=after)
    assert len(made.encode()) <= 255 and made.startswith(before + name[:1]) and made.endswith(after)
    assert (made == before + name + after) == (len((before + name + after).encode()) <= 255)
    assert fitting(name[:-1] + "b", before=before, after=after) != made
    if made != before + name + after:  # as much of the name stays as fits: 255 bytes, 254 where a letter takes two
        assert 254 <= len(made.encode()) <= 255 and (len(made.encode()) == 255 or "é" in name)


def test_a_tree_is_removed_through_descriptors(tmp_path: Path) -> None:
    deep = tmp_path / "tree"
    for _ in range(150):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "x").write_text("x")
    disk.remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []
    for _ in range(250):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(StorageError, match="too deep"):
        disk.remove_tree(tmp_path / "tree")
    (tmp_path / "link").symlink_to("tree")
    with pytest.raises(StorageError):
        disk.remove_tree(tmp_path / "link")
    assert (tmp_path / "tree").is_dir() and (tmp_path / "link").is_symlink()
