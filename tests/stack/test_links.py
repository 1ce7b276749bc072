"""Files with other names: never written through."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import state
from tests.stack.models import Raw, every_dtype, moved, weights, write

FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def base() -> Raw:
    return every_dtype()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Raw) -> Path:
    """The current folder: `clean` in three shards, `p` for two of them, `tuned` as `p` makes it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "clean", base, 3)
    names = [n for n in list(base)[0::3] + list(base)[1::3] if base[n][1]]
    write(tmp_path / "tuned", moved(base, names, 1), 3)
    wl.diff("clean", "tuned", "p.safetensors")
    return tmp_path


def symbolic(folder: Path, kept: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        shutil.move(file, kept / file.name)
        file.symlink_to(os.path.relpath(kept / file.name, folder))


def symbolic_and_absolute(folder: Path, kept: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        shutil.move(file, kept / file.name)
        file.symlink_to(kept / file.name)


def hard(folder: Path, kept: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        (kept / file.name).hardlink_to(file)


def one_of_them(folder: Path, kept: Path) -> None:
    (kept / FIRST).hardlink_to(folder / FIRST)


def chain(folder: Path, kept: Path) -> None:
    """A link to a link."""
    symbolic(folder, kept)
    for file in sorted(folder.glob("*.safetensors")):
        (kept / f"{file.name}.link").symlink_to(file.name)
        file.unlink()
        file.symlink_to(kept / f"{file.name}.link")


LINKS = [symbolic, symbolic_and_absolute, hard, one_of_them, chain]


@pytest.fixture(params=LINKS)
def linked(place: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(`model`, whose shards are links to, or other names of, those in `kept`; `kept`)."""
    shutil.copytree("clean", "model")
    (place / "kept").mkdir()
    make: Callable[[Path, Path], None] = request.param
    make(place / "model", place / "kept")
    return place / "model", place / "kept"


def is_link(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


def test_refused_unless_asked_for(weightlab: Weightlab, place: Path, linked: tuple[Path, Path]) -> None:
    model, _ = linked
    before = content(place)
    for words in ((), ("--dry-run",), ("--links", "refuse")):
        ended = weightlab("apply", "model", "p.safetensors", "--in-place", *words)
        assert ended.code == 4 and "--links copy" in ended.err and "--out" in ended.err
        named = {line.strip() for line in ended.err.splitlines() if line.startswith("  ") and "→" not in line}
        assert named == {f for f in sorted(weights(model))[:2] if is_link(model / f)} != set()
    assert content(place) == before


def test_copied_first_where_asked_for(weightlab: Weightlab, place: Path, linked: tuple[Path, Path]) -> None:
    model, kept = linked
    others = content(kept)
    links = {f for f in weights(model) if is_link(model / f)}
    ended = weightlab("apply", "model", "p.safetensors", "--in-place", "--links", "copy")
    assert ended.code == 0, ended.err
    first, second, third = sorted(weights(model))
    for file in sorted({first, second} & links):
        assert f"{file} was a link; it is a copy of its own now" in ended.out
        assert not is_link(model / file)
    assert is_link(model / third) == (third in links)  # no patch touches it
    assert weights(model) == weights(place / "tuned")
    assert content(kept) == others
    assert weightlab("scale", "model", "p.safetensors", "0").code == 0  # the links are done with
    assert weightlab("remove", "model", "--all").code == 0
    assert content(model) == content(place / "clean") and content(kept) == others


def test_a_link_that_comes_while_a_patch_is_on(weightlab: Weightlab, place: Path) -> None:
    """Someone gives the patched shard another name: taking the patch off would change what they keep."""
    shutil.copytree("clean", "model")
    assert weightlab("apply", "model", "p.safetensors", "--in-place").code == 0
    Path("snapshot.safetensors").hardlink_to(Path("model", FIRST))
    before = content(place)
    ended = weightlab("remove", "model", "--all")
    assert ended.code == 4 and FIRST in ended.err
    assert content(place) == before
    assert weightlab("remove", "model", "--all", "--links", "copy").code == 0
    assert content(place / "model") == content(place / "clean")
    assert Path("snapshot.safetensors").read_bytes() == Path("tuned", FIRST).read_bytes()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the Hub's cache: blobs by their hash, and a snapshot of links to them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "models--org--name"
    revision = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    revision.mkdir(parents=True)
    (folder / "blobs").mkdir()
    save_file(state(), "weights")
    for name, source in (("model.safetensors", Path("weights").read_bytes()), ("config.json", b"{}")):
        blob = folder / "blobs" / hashlib.sha256(source).hexdigest()
        blob.write_bytes(source)
        (revision / name).symlink_to(Path("..", "..", "blobs", blob.name))
    wl.diff(revision, state(1, 0.01), "p.safetensors")
    return revision


@pytest.mark.parametrize("links", ["refuse", "copy"])
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_snapshot_in_the_cache(weightlab: Weightlab, snapshot: Path, links: str, name: str) -> None:
    before = content(Path())
    ended = weightlab("apply", snapshot / name, "p.safetensors", "--in-place", "--links", links)
    assert ended.code == 4 and "a snapshot in the Hub's cache" in ended.err and "--out" in ended.err
    assert content(Path()) == before
    out = "new.safetensors" if name else "new"
    assert weightlab("apply", snapshot / name, "p.safetensors", "-o", out).code == 0
    made = Path(out) if name else Path(out, "model.safetensors")
    assert made.is_file() and not made.is_symlink()
    found = content(Path())
    assert {n: d for n, d in found.items() if not n.startswith(out)} == before
    assert weightlab("apply", out, "p.safetensors", "--in-place").code == 4  # it is not the base any more
    assert weightlab("diff", out, snapshot / name, "-o", "back.safetensors").code == 0


@pytest.mark.parametrize("links", ["refuse", "copy"])
def test_a_folder_that_leads_into_the_cache(weightlab: Weightlab, snapshot: Path, links: str) -> None:
    Path("shortcut").symlink_to(snapshot)
    before = content(Path())
    ended = weightlab("apply", "shortcut", "p.safetensors", "--in-place", "--links", links)
    assert ended.code == 4 and "a snapshot in the Hub's cache" in ended.err
    assert content(Path()) == before


def test_a_file_that_leads_into_the_cache(weightlab: Weightlab, snapshot: Path) -> None:
    """A link of one's own beside other files: refused by default, copied on request, and the blob is left alone."""
    Path("mine").mkdir()
    Path("mine/model.safetensors").symlink_to(snapshot / "model.safetensors")
    blobs = content(Path("hub"))
    assert weightlab("apply", "mine", "p.safetensors", "--in-place").code == 4
    assert weightlab("apply", "mine/model.safetensors", "p.safetensors", "--in-place", "--links", "copy").code == 0
    assert not Path("mine/model.safetensors").is_symlink()
    assert weightlab("remove", "mine", "p.safetensors").code == 0
    assert Path("mine/model.safetensors").read_bytes() == Path("weights").read_bytes()
    assert content(Path("hub")) == blobs and not Path("mine/.weightlab").exists()


def test_a_folder_that_is_a_link(weightlab: Weightlab, place: Path) -> None:
    """It is the same model: what is put on under one name comes off under the other."""
    shutil.copytree("clean", "model")
    Path("alias").symlink_to("model")
    assert weightlab("apply", "alias", "p.safetensors", "--in-place").code == 0
    assert weights(place / "model") == weights(place / "tuned")
    assert weightlab("remove", "model", "--all").code == 0
    assert content(place / "model") == content(place / "clean")


def test_a_moved_folder(weightlab: Weightlab, place: Path) -> None:
    """No path is recorded: a folder can be renamed or copied with what is on it."""
    shutil.copytree("clean", "model")
    assert weightlab("apply", "model", "p.safetensors", "--in-place").code == 0
    Path("elsewhere").mkdir()
    Path("model").rename("elsewhere/moved")
    shutil.copytree("elsewhere/moved", "copied")
    for folder in ("elsewhere/moved", "copied"):
        assert weightlab("remove", folder, "--all").code == 0
        assert content(place / folder) == content(place / "clean")
