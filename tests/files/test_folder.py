"""A folder that is held open, where other things than plain files and folders lie in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from weightlab.errors import IntegrityError, StorageError
from weightlab.files import disk
from weightlab.files.folder import open_folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a file, folders with a file in them, a link to each, and a FIFO."""
    home = tmp_path / "home"
    (home / "folder" / "inner").mkdir(parents=True)
    (home / "file").write_bytes(b"0123456789")
    (home / "folder" / "inner" / "deep").write_bytes(b"deep")
    (home / "link").symlink_to("file")
    (home / "away").symlink_to("folder")
    os.mkfifo(home / "fifo")
    return home


def test_what_stands_under_a_name(place: Path) -> None:
    with open_folder(place) as folder:
        kinds = {name: folder.kind(name) for name in [*folder.names(), "nothing", "file/below"]}
        found = folder.look("file")
    assert kinds == {
        "away": "link",
        "fifo": "other",
        "file": "file",
        "folder": "folder",
        "link": "link",
        "nothing": None,
        "file/below": None,
    }
    assert found is not None and found.st_size == 10


def test_the_path_is_the_real_one(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other name").symlink_to(place)
    with open_folder(tmp_path / "other name") as folder:
        assert folder.path == place


def test_a_folder_that_is_none(place: Path) -> None:
    with pytest.raises(StorageError, match="Not a directory"), open_folder(place / "file"):
        pass


def test_only_a_folder_of_its_own_is_entered(place: Path) -> None:
    with open_folder(place) as folder:
        with folder.inside("folder") as inside:
            assert inside is not None and inside.names() == ["inner"] and inside.path == place / "folder"
        with folder.inside("nothing") as inside:
            assert inside is None
        for name in ("file", "link", "away", "fifo"):
            with pytest.raises(IntegrityError, match=f"{name} is no folder of its own"), folder.inside(name):
                pass


def test_a_folder_that_the_system_does_not_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: str, *rest: int, **options: int) -> int:
        if path == "folder":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *rest, **options)

    with open_folder(place) as folder:
        monkeypatch.setattr(os, "open", refusing)
        with pytest.raises(StorageError, match="folder: Permission denied"), folder.inside("folder"):
            pass


def test_made_where_there_is_none(place: Path) -> None:
    with open_folder(place) as folder:
        for name, holds in (("new", []), ("folder", ["inner"])):
            with folder.made(name) as made:
                assert made.names() == holds
        with pytest.raises(IntegrityError, match="link is no folder"), folder.made("link"):
            pass
    assert (place / "new").is_dir()


def test_a_file_in_folders_below(place: Path) -> None:
    with open_folder(place) as folder:
        with folder.holder("folder/inner/deep") as (inner, name):
            assert (inner.path, name, inner.read(name, 4)) == (place / "folder" / "inner", "deep", b"deep")
        with folder.holder("file") as (same, name):
            assert same is folder and name == "file"
        with pytest.raises(IntegrityError, match="nothing is missing"), folder.holder("nothing/deep"):
            pass
        with pytest.raises(IntegrityError, match="away is no folder"), folder.holder("away/inner/deep"):
            pass


def test_only_plain_files_are_opened(place: Path) -> None:
    with open_folder(place) as folder:
        for name, says in (
            ("nothing", "nothing is missing"),
            ("link", "link is a symbolic link"),
            ("fifo", "fifo is no plain file"),
            ("folder", "folder is no plain file"),
        ):
            for write in (False, True):
                with pytest.raises(IntegrityError, match=says):
                    folder.open_file(name, write=write)
        for write in (False, True):
            fd = folder.open_file("file", write=True) if write else folder.open_file("file")
            try:
                if write:
                    assert os.pwrite(fd, b"x", 9) == 1
                else:
                    with pytest.raises(OSError, match="Bad file descriptor"):
                        os.pwrite(fd, b"x", 9)
            finally:
                os.close(fd)
    assert (place / "file").read_bytes() == b"012345678x"


def test_swapped_for_a_fifo_between_the_look_and_the_opening(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder(place) as folder:
        monkeypatch.setattr(folder, "kind", lambda name: "file")
        with pytest.raises(IntegrityError, match="fifo is no plain file"):
            folder.open_file("fifo")


def test_no_more_than_the_limit_is_read(place: Path) -> None:
    with open_folder(place) as folder:
        assert folder.read("nothing", 10) is None
        assert folder.read("file", 10) == b"0123456789" and folder.read("file", 11) == b"0123456789"
        with pytest.raises(IntegrityError, match="more than 9 bytes"):
            folder.read("file", 9)


def test_a_small_file_is_whole_or_what_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder(place) as folder:
        folder.replace("file", b"new")
        assert (place / "file").read_bytes() == b"new"
        names = folder.names()

        def failing(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(StorageError, match="the disk is full"):
            folder.replace("file", b"newer")
        assert folder.names() == names and (place / "file").read_bytes() == b"new"


def test_names_change_within_the_folder_or_go_to_another(place: Path) -> None:
    with open_folder(place) as folder, folder.made("folder") as other:
        folder.move("file", "renamed")
        folder.move("renamed", "moved", to=other)
        assert other.names() == ["inner", "moved"]
        other.remove("moved")
        other.remove("moved", missing_ok=True)
        with pytest.raises(StorageError, match="No such file"):
            other.remove("moved")
        with pytest.raises(StorageError, match="not empty"):
            folder.remove_folder("folder")
        folder.remove_tree("folder")
        assert folder.names() == ["away", "fifo", "link"]


@pytest.mark.parametrize(("deep", "goes"), [(3, True), (4, False)])
def test_a_tree_is_removed_to_a_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: int, goes: bool) -> None:
    monkeypatch.setattr(disk, "_DEEPEST", 3)
    root = tmp_path / "tree"
    root.joinpath(*("below" for _ in range(deep))).mkdir(parents=True)
    if goes:
        disk.remove_tree(root)
    else:
        with pytest.raises(StorageError, match="too deep"):
            disk.remove_tree(root)
    assert root.exists() != goes


def test_one_file_of_a_tree_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., None] = os.unlink
    for last in ("a", "b", "c"):
        (tmp_path / "tree" / "inner").mkdir(parents=True)
        for name in ("a", "b", "c", f"inner/{last}"):
            (tmp_path / "tree" / name).touch()
        gone: list[str] = []
        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", lambda name, gone=gone, **options: (gone.append(name), real(name, **options)))
            disk.remove_tree(tmp_path / "tree", last=last)
        assert len(gone) == 4 and gone[-1] == last and not (tmp_path / "tree").exists()
