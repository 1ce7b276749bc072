"""What is on a checkpoint does not need the files that it came from; damage to what is kept is found before a write."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import overwrite
from tests.stack.models import ENCODINGS, every_dtype, in_memory, moved, weights, write
from weightlab.errors import IntegrityError
from weightlab.files import disk
from weightlab.stack import transaction
from weightlab.stack.journal import BUSY


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `clean` and `model` in two shards, `p` (exact), `q` (dense) and `r` (sign)."""
    monkeypatch.chdir(tmp_path)
    base = every_dtype()
    write(tmp_path / "clean", base, 2)
    write(tmp_path / "model", base, 2)
    for number, (name, encode) in enumerate((("p", "exact"), ("q", "dense:bf16"), ("r", "sign"))):
        floats = [n for n, (spec, raw) in base.items() if spec.is_float and raw]
        write(tmp_path / f"to-{name}", moved(base, floats, number + 1), 1)
        wl.diff("clean", f"to-{name}", f"{name}.safetensors", encode=encode)
    return tmp_path


def deleted(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    """As `mv` does, and every program that writes whole files."""
    shutil.copy("r.safetensors", "temporary")
    os.replace("temporary", path)


def written_over(path: Path) -> None:
    """As `cp` does: the same file on the disk gets another content."""
    path.write_bytes(Path("r.safetensors").read_bytes())


def damaged(path: Path) -> None:
    overwrite(path, path.stat().st_size - 9, bytes([path.read_bytes()[-9] ^ 255]))


def cut_off(path: Path) -> None:
    os.truncate(path, 10)


def without_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize(
    ("happens", "links"),
    [(deleted, True), (replaced, True), (written_over, False), (damaged, False), (cut_off, False)],
)
def test_the_patch_file(
    weightlab: Weightlab, place: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Path], None], links: bool
) -> None:
    if not links:  # then copies are kept, and nothing that becomes of the file matters
        monkeypatch.setattr(os, "link", without_links)
    weightlab("apply", "model", "p.safetensors", "q.safetensors@0.5", "--in-place")
    identity = wl.open_patch("p.safetensors").id
    wl.apply("clean", ["p.safetensors@-0.5", "q.safetensors@0.5"], out="expected")
    wl.apply("clean", "q.safetensors@0.5", out="expected after")
    happens(Path("p.safetensors"))
    happens(Path("q.safetensors"))
    assert weightlab("status", "model").code == 0
    assert weightlab("scale", "model", identity[:10], "-0.5").code == 0
    assert weights(place / "model") == weights(place / "expected")
    assert weightlab("remove", "model", identity[:10]).code == 0
    assert weights(place / "model") == weights(place / "expected after")
    assert weightlab("remove", "model", "--all").code == 0
    assert content(place / "model") == content(place / "clean")


@pytest.mark.parametrize("happens", [written_over, damaged, cut_off])
def test_what_changes_the_kept_patch_too_is_found_and_it_still_comes_off(
    weightlab: Weightlab, place: Path, happens: Callable[[Path], None]
) -> None:
    weightlab("apply", "model", "p.safetensors", "q.safetensors@0.5", "--in-place")
    identity = wl.open_patch("p.safetensors").id
    wl.apply("clean", "q.safetensors@0.5", out="expected after")
    happens(Path("p.safetensors"))
    before = content(place / "model")
    refused = weightlab("scale", "model", identity[:10], "-0.5")
    assert refused.code == 5 and identity[:12] in refused.err
    assert content(place / "model") == before
    assert weightlab("remove", "model", identity[:10]).code == 0
    assert weights(place / "model") == weights(place / "expected after")
    assert weightlab("remove", "model", "--all").code == 0
    assert content(place / "model") == content(place / "clean")


def test_a_patch_under_a_symbolic_link(weightlab: Weightlab, place: Path) -> None:
    Path("links").mkdir()
    Path("links/p.safetensors").symlink_to("../p.safetensors")
    assert weightlab("apply", "model", "links/p.safetensors", "--in-place").code == 0
    deleted(Path("links/p.safetensors"))
    deleted(Path("p.safetensors"))
    assert weightlab("scale", "model", "p.safetensors", "0.5").code == 0
    assert weightlab("remove", "model", "p.safetensors").code == 0
    assert content(place / "model") == content(place / "clean")


def test_a_patch_object_whose_file_is_another_by_now(place: Path) -> None:
    patch = wl.open_patch("p.safetensors")
    replaced(Path("p.safetensors"))
    before = content(place)
    with pytest.raises(IntegrityError, match="was changed while it was in use"):
        wl.apply("model", patch, in_place=True)
    assert content(place) == before


@pytest.mark.parametrize("encode", ENCODINGS)
def test_a_patch_that_was_never_in_a_file(place: Path, encode: str) -> None:
    base = every_dtype()
    state = in_memory(base)
    tuned = in_memory(moved(base, [n for n in state if base[n][0].is_float], 9))
    patch = wl.diff(state, tuned, encode=encode)
    assert patch.path is None
    wl.apply("model", patch, in_place=True)
    wl.apply("clean", patch.at(0.25), out="expected")
    identity = patch.id
    del patch
    wl.scale("model", identity[:12], 0.25)
    assert weights(place / "model") == weights(place / "expected")
    wl.remove("model", identity[:12])
    assert content(place / "model") == content(place / "clean")


def originals() -> list[Path]:
    return sorted(Path("model/.weightlab").glob("*/originals/*.bin"))


def kept(patch: str) -> Path:
    return next(Path("model/.weightlab").glob(f"*/patches/{wl.open_patch(patch).id}/*.safetensors"))


def record() -> Path:
    return next(Path("model/.weightlab").glob("*/stack.json"))


DAMAGE: dict[str, tuple[Callable[[], object], str]] = {
    "a bit of the clean bytes": (lambda: damaged(originals()[0]), "kept clean bytes are damaged"),
    "the first clean byte": (
        lambda: overwrite(originals()[0], 0, bytes([originals()[0].read_bytes()[0] ^ 1])),
        "kept clean bytes are damaged",
    ),
    "clean bytes are cut off": (lambda: os.truncate(originals()[0], 100), "1.bin has 100 bytes"),
    "clean bytes are gone": (lambda: deleted(originals()[0]), "1.bin is missing"),
    "all clean bytes are gone": (lambda: shutil.rmtree(originals()[0].parent), "1.bin is missing"),
    "the record is gone": (lambda: record().unlink(), "stack.json is gone"),
    "the record is empty": (lambda: os.truncate(record(), 0), "damaged"),
    "the record says something else": (
        lambda: record().write_bytes(record().read_bytes().replace(b'"schema":1', b'"schema":1,"more":2')),
        "damaged",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_kept_is_damaged(weightlab: Weightlab, place: Path, what: str) -> None:
    assert weightlab("apply", "model", "p.safetensors", "q.safetensors", "--in-place").code == 0
    damage, said = DAMAGE[what]
    damage()
    before = content(place)
    for words in (
        ("remove", "model", "--all"),
        ("remove", "model", "p.safetensors"),
        ("scale", "model", "q.safetensors", "2"),
        ("apply", "model", "r.safetensors", "--in-place"),
        ("remove", "model", "--all", "--dry-run"),
    ):
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended)
        assert said in ended.err and "--forget" in ended.err, ended.err
    for words in (("verify", "model"), ("apply", "model", "r.safetensors", "-o", "new")):
        ended = weightlab(*words)
        assert ended.code == 5 and said in ended.err
    assert content(place) == before
    files = weights(place / "model")
    assert weightlab("remove", "model", "--forget").code == 0
    assert weights(place / "model") == files and not Path("model/.weightlab").exists()


KEPT: dict[str, Callable[[], object]] = {
    "gone": lambda: shutil.rmtree(kept("q.safetensors").parent),
    "a bit": lambda: damaged(kept("q.safetensors")),
    "cut off": lambda: cut_off(kept("q.safetensors")),
    "another": lambda: written_over(kept("q.safetensors")),
}


@pytest.mark.parametrize("what", KEPT)
def test_the_kept_patch_is_damaged(
    weightlab: Weightlab, place: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What needs the patch is refused; taking it off does not need it, and gives the first bytes."""
    monkeypatch.setattr(os, "link", without_links)  # so that only what is kept is damaged
    assert weightlab("apply", "model", "p.safetensors", "q.safetensors", "--in-place").code == 0
    wl.apply("clean", "p.safetensors", out="expected")
    KEPT[what]()
    before = content(place)
    for words in (
        ("remove", "model", "p.safetensors"),
        ("scale", "model", "q.safetensors", "2"),
        ("apply", "model", "r.safetensors", "--in-place"),
        ("apply", "model", "r.safetensors", "-o", "new"),
    ):
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended)
        assert wl.open_patch("q.safetensors").id[:12] in ended.err
    assert weightlab("status", "model").code == 0  # the model's files are as they were left
    assert content(place) == before
    assert weightlab("remove", "model", "q.safetensors").code == 0
    assert weights(place / "model") == weights(place / "expected")
    assert weightlab("remove", "model", "--all").code == 0
    assert content(place / "model") == content(place / "clean")


@pytest.mark.parametrize("command", ["remove q", "remove all"])
@pytest.mark.parametrize(("at", "happens"), [(0, cut_off), (1, damaged), (5, cut_off), (6, damaged)])
def test_taking_a_damaged_patch_off_is_interrupted(
    weightlab: Weightlab,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    at: int,
    happens: Callable[[Path], None],
) -> None:
    """There is no way back without the patch, so what was begun is ended: the clean bytes are all it takes."""
    wl.apply("clean", "p.safetensors", out="expected")
    assert weightlab("apply", "model", "p.safetensors", "q.safetensors", "--in-place").code == 0
    happens(Path("q.safetensors"))
    words = ("remove", "model", "q.safetensors") if command == "remove q" else ("remove", "model", "--all")
    write, written = disk.write_at, 0

    def stop(*arguments: Any) -> None:
        nonlocal written
        if arguments[-1].name.endswith(BUSY):
            written += 1
            if written > at:
                raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as during:
        during.setattr(disk, "write_at", stop)
        during.setattr(transaction._Change, "_go_back", lambda *_: None)
        assert weightlab(*words, "--threads", "1").code == 130
    assert sorted(Path("model").glob(f"*{BUSY}"))
    ended = weightlab("status", "model")
    assert ended.code == 0 and "finished a change that was interrupted" in ended.out
    if command == "remove q":
        assert weights(place / "model") == weights(place / "expected")
        assert weightlab("remove", "model", "--all").code == 0
    assert content(place / "model") == content(place / "clean")
