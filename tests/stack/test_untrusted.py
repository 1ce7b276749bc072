"""`.weightlab` that came with a model: no command reaches outside the model's folder, whatever is in there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weightlab as wl
from tests.cli.conftest import Ended, Weightlab
from tests.stack.hostile import SHARD, STATE, VICTIM, around, edit, lay_out
from weightlab.errors import IntegrityError

COMMANDS = [
    ("status", "model"),
    ("status", "model", "--dry-run"),
    ("apply", "model", "q.safetensors", "--in-place", "--links", "copy"),
    ("apply", "model", "q.safetensors", "--in-place", "--dry-run"),
    ("apply", "model", "q.safetensors", "-o", "out"),
    ("remove", "model", "--all"),
    ("scale", "model", "p.safetensors", "2"),
    ("verify", "model"),
    ("inspect", "model"),
    ("diff", "clean", "model", "-o", "d.safetensors"),
    ("transfer", "model", "clean", "clean", "-o", "moved"),
    ("remove", "model", "--forget"),
    ("status", "model"),
]


def link(inside: Path, to: str) -> None:
    """Puts a link in the place of what is there."""
    if inside.is_symlink() or inside.is_file():
        inside.unlink()
    elif inside.is_dir():
        shutil.rmtree(inside)
    inside.symlink_to(os.path.relpath(to, inside.parent))


def patch_folder() -> Path:
    (only,) = (STATE / "patches").iterdir()
    return only


LINKS: dict[str, Callable[[], object]] = {
    "the whole": lambda: link(STATE.parent, VICTIM),
    "the state": lambda: link(STATE, VICTIM),
    "a second state": lambda: link(STATE.parent / "other.safetensors.stack", VICTIM),
    "anything else": lambda: link(STATE.parent / "x", VICTIM),
    "originals": lambda: link(STATE / "originals", VICTIM),
    "patches": lambda: link(STATE / "patches", f"{VICTIM}/sub"),
    "copies": lambda: link(STATE / "copies", VICTIM),
    "a patch": lambda: link(patch_folder(), f"{VICTIM}/sub"),
    "another patch": lambda: link(STATE / "patches" / ("b" * 64), f"{VICTIM}/sub"),
    "a patch's file": lambda: link(patch_folder() / "patch.safetensors", f"{VICTIM}/{SHARD}"),
    "clean bytes": lambda: link(STATE / "originals" / "1.bin", f"{VICTIM}/1.bin"),
    "other clean bytes": lambda: link(STATE / "originals" / "2.bin", f"{VICTIM}/1.bin"),
    "stack.json": lambda: link(STATE / "stack.json", f"{VICTIM}/stack.json"),
    "intent.json": lambda: link(STATE / "intent.json", f"{VICTIM}/stack.json"),
    "a temporary": lambda: link(STATE / ".stack.json.0123abcd.partial", f"{VICTIM}/stack.json"),
    "a dropped state": lambda: link(STATE.parent / ".x.stack.dropped", VICTIM),
    "a link to nowhere": lambda: link(STATE / "originals" / "3.bin", "nowhere"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay_out()
    return tmp_path


def run_all(weightlab: Weightlab) -> list[Ended]:
    """Every command, with a look at the victim and at what was put in beside it after each."""
    before = around(VICTIM, "clean")
    ended = []
    for words in COMMANDS:
        ended.append(weightlab(*words))
        assert around(VICTIM, "clean") == before, words
        assert ended[-1].code in (0, 3, 4, 5, 7), (words, ended[-1].err)
    return ended


@pytest.mark.parametrize("what", LINKS)
def test_links_are_refused_and_lead_nowhere(weightlab: Weightlab, place: Path, what: str) -> None:
    LINKS[what]()
    ended = run_all(weightlab)
    for words, found in zip(COMMANDS[:-2], ended[:-2], strict=True):
        assert found.code == 5, (words, found.out)
        assert "link" in found.err.splitlines()[0], (words, found.err)
    if what == "the whole":
        assert ended[-2].code == 5 and STATE.parent.is_symlink()
    else:
        assert ended[-2].code == 0, ended[-2].err
        assert ended[-1].code == 0
        assert not STATE.parent.exists()


def test_links_are_listed(place: Path) -> None:
    for what in ("originals", "a patch's file", "stack.json"):
        LINKS[what]()
    with pytest.raises(IntegrityError) as caught:
        wl.status("model")
    assert len(caught.value.offenders) == 3


NAMES = [
    "../victim/thesis.txt",
    "/etc/hostname",
    "..",
    "",
    ".",
    "a/../../victim/1.bin",
    "a\0b",
    "x" * 256,
    "a\\b",
    "\ud800",
]


def set_shard(tree: Any, name: str) -> None:
    tree["shards"] = [SHARD, name]


def set_headers(tree: Any, name: str) -> None:
    tree["headers"] = {name: tree["headers"][SHARD]}


def set_file(tree: Any, name: str) -> None:
    tree["tensors"]["w"]["file"] = name
    set_headers(tree, name)


def set_original(tree: Any, name: str) -> None:
    tree["tensors"]["w"]["original"]["file"] = name


def set_patch(tree: Any, name: str) -> None:
    tree["patches"][0]["id"] = name


FIELDS: dict[str, tuple[str, Callable[[Any, str], None]]] = {
    "shards": ("intent.json", set_shard),
    "rewrite": ("intent.json", lambda tree, name: tree["rewrite"].append(name)),
    "new originals": ("intent.json", lambda tree, name: set_original(tree["new"], name)),
    "new patches": ("intent.json", lambda tree, name: set_patch(tree["new"], name)),
    "headers": ("stack.json", set_headers),
    "files": ("stack.json", set_file),
    "originals": ("stack.json", set_original),
    "patches": ("stack.json", set_patch),
    "anchor": ("stack.json", lambda tree, name: tree.update(anchor=name)),
}


def test_a_tensor_that_the_change_does_not_touch(
    weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the model, and no clean bytes of it are kept."""
    monkeypatch.chdir(tmp_path)
    lay_out(begun=True)
    edit("intent.json", lambda tree: tree["rewrite"].append("v"))
    before = around("model", VICTIM)
    ended = weightlab("status", "model")
    assert ended.code == 5 and "v: not a tensor that the change concerns" in ended.err
    assert around("model", VICTIM) == before


@pytest.mark.parametrize("name", [*NAMES, "thesis.txt", "clean/model.safetensors"], ids=repr)
@pytest.mark.parametrize("field", FIELDS)
def test_names_that_a_record_may_not_give(
    weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    """Paths, and names of files that are not the model's own (which is fine for an anchor: it is not read)."""
    monkeypatch.chdir(tmp_path)
    file, change = FIELDS[field]
    lay_out(begun=file == "intent.json")
    edit(file, lambda tree: change(tree, name))
    model = around("model")
    victim = around(VICTIM, "clean")
    fine = field == "anchor" and name in ("thesis.txt", "clean/model.safetensors")
    for words in COMMANDS[:8]:
        ended = weightlab(*words)
        assert around(VICTIM, "clean") == victim
        if fine:
            break
        assert ended.code == 5, (words, ended.out, ended.err)
        if "status" not in words:
            assert around("model") == model, words
    assert weightlab("remove", "model", "--forget").code == 0
    assert around(VICTIM, "clean") == victim and not STATE.parent.exists()


MALFORMED: dict[str, Callable[[Any], object]] = {
    "a list": lambda tree: None,
    "schema 2": lambda tree: tree.update(schema=2),
    "a key too many": lambda tree: tree.update(more=1),
    "a key of a tensor missing": lambda tree: tree["tensors"]["w"].pop("clean"),
    "no headers": lambda tree: tree.update(headers={}),
    "a text for a number": lambda tree: tree.update(sequence="1"),
    "a number below zero": lambda tree: tree.update(sequence=-1),
    "a number of 100 digits": lambda tree: tree.update(sequence=10**100),
    "an offset below zero": lambda tree: tree["tensors"]["w"]["original"].update(offset=-8),
    "an offset beyond all": lambda tree: tree["tensors"]["w"]["original"].update(offset=2**70),
    "an offset beyond the file": lambda tree: tree["tensors"]["w"]["original"].update(offset=8),
    "a scale that is no fp32": lambda tree: tree["patches"][0].update(scale=1e300),
    "a patch twice": lambda tree: tree["patches"].append(tree["patches"][0]),
    "a patch that is not kept": lambda tree: tree["patches"][0].update(id="c" * 64),
    "a tensor that is not there": lambda tree: tree["tensors"].update(nope=tree["tensors"]["w"]),
    "a tensor of other clean bytes": lambda tree: tree["tensors"]["w"].update(clean="d" * 64),
    "another tensor's bytes": lambda tree: tree["tensors"]["w"].update(now="d" * 64),
    "another header": lambda tree: tree["headers"].update({SHARD: "d" * 64}),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_records_that_are_false(weightlab: Weightlab, place: Path, what: str) -> None:
    if what == "a list":
        (STATE / "stack.json").write_text("[]")
    edit("stack.json", MALFORMED[what]) if what != "a list" else None
    before = around("model", VICTIM)
    for words in (("apply", "model", "q.safetensors", "-o", "out"), ("verify", "model")):
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended.out, ended.err)
        assert "bug" not in ended.err and ended.err.count("\n") > 1
    assert around("model", VICTIM) == before
    assert weightlab("status", "model").code in (0, 5)
    assert weightlab("remove", "model", "--forget").code == 0
    assert around(VICTIM) == {path: seen for path, seen in before.items() if path.startswith(VICTIM)}


TEXTS = [
    "",
    "{",
    "null",
    "[1]",
    '{"schema": 1, "schema": 1}',
    '{"sequence": NaN}',
    "[" * 100_000,
    '{"a":' * 5000,
    "\xff",
]


@pytest.mark.parametrize("text", TEXTS, ids=[t[:12] for t in TEXTS])
@pytest.mark.parametrize("name", ["stack.json", "intent.json"])
def test_records_that_are_none(weightlab: Weightlab, place: Path, name: str, text: str) -> None:
    (STATE / name).write_bytes(text.encode("latin-1"))
    before = around("model", VICTIM)
    for words in COMMANDS[:8]:
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended.out, ended.err)
        assert (name in ended.err and "--forget" in ended.err) or "interrupted" in ended.err
    assert around("model", VICTIM) == before
    assert weightlab("remove", "model", "--forget").code == 0


@pytest.mark.parametrize("where", ["stack.json", "intent.json", "originals/1.bin", "originals", "patches"])
def test_a_fifo_is_not_waited_for(weightlab: Weightlab, place: Path, where: str) -> None:
    path = STATE / where
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.mkfifo(path)
    for words in COMMANDS[:9]:
        assert weightlab(*words).code in (0, 5), words
    assert weightlab("verify", "model").code == 5
    assert weightlab("remove", "model", "--forget").code == 0
    assert not STATE.parent.exists()


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_shard_set_aside_that_is_a_link(
    weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What undoes a change writes into the shard that was set aside: never into a file that has another name."""
    monkeypatch.chdir(tmp_path)
    lay_out(begun=True)
    busy = Path(f"model/{SHARD}.weightlab-busy")
    shutil.copyfile(busy, f"{VICTIM}/{SHARD}")
    busy.unlink()
    os.symlink(f"../{VICTIM}/{SHARD}", busy) if how == "symbolic" else os.link(f"{VICTIM}/{SHARD}", busy)
    before = around(VICTIM)
    for words in COMMANDS[:8]:
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended.out, ended.err)
        assert around(VICTIM) == before
    if how == "hard":
        shutil.copyfile(busy, "own")
        os.replace("own", busy)
        assert weightlab("status", "model").code == 0
        assert around(VICTIM)[f"{VICTIM}/{SHARD}"][-1] == before[f"{VICTIM}/{SHARD}"][-1]
        assert weightlab("remove", "model", "--all").code == 0
        assert Path(f"model/{SHARD}").read_bytes() == Path(f"clean/{SHARD}").read_bytes()


def test_what_others_put_into_the_folder_stays(weightlab: Weightlab, place: Path) -> None:
    """Only what weightlab makes there is cleared away."""
    theirs = [
        "originals/notes.txt",
        "patches/readme",
        "mine.partial",
        ".note.0123abcd.partial",
        "originals/.2.bin.part",
    ]
    for name in theirs:
        (STATE / name).write_text("mine")
    (STATE / "originals" / "7.bin").mkdir()
    assert weightlab("status", "model").code == 0
    assert weightlab("remove", "model", "--all").code == 0
    assert Path(f"model/{SHARD}").read_bytes() == Path(f"clean/{SHARD}").read_bytes()
    assert [(STATE / name).read_text() for name in theirs] == ["mine"] * len(theirs)
    assert (STATE / "originals" / "7.bin").is_dir()
    assert weightlab("status", "model").code in (0, 5)
    assert json.loads(weightlab("status", "model", "--json").out or "{}").get("patches", []) == []


def test_a_name_cannot_speak_to_the_terminal(weightlab: Weightlab, place: Path) -> None:
    edit("stack.json", lambda tree: tree["patches"][0].update(name="\x1b]0;mine\x07\u202e.safetensors"))
    ended = weightlab("status", "model")
    assert ended.code == 0 and "?]0;mine??.safetensors" in ended.out and "\x1b" not in ended.out
    assert weightlab("apply", "model", "q.safetensors", "--in-place").code == 0
    assert weightlab("remove", "model", "--all").code == 0
    odd = Path("\x1b[1m.safetensors")
    shutil.copyfile("p.safetensors", odd)
    assert weightlab("apply", "model", str(odd), "--in-place").code == 0
    assert "?[1m.safetensors" in weightlab("status", "model").out
    assert weightlab("remove", "model", str(odd)).code == 0


def test_a_record_of_a_long_name_is_for_that_name(
    weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out()
    assert weightlab("remove", "model", "--all").code == 0
    names = ["k" * 243 + end + ".safetensors" for end in ("", "b")]
    os.rename(f"model/{SHARD}", f"model/{names[0]}")
    assert weightlab("apply", "model", "p.safetensors", "--in-place").code == 0
    (state,) = Path("model/.weightlab").iterdir()
    record = json.loads((state / "stack.json").read_text())
    assert record["anchor"] == names[0]
    for other in (names[1], SHARD, "../model.safetensors"):
        (state / "stack.json").write_text(json.dumps(record | {"anchor": other}))
        ended = weightlab("status", "model")
        assert ended.code == 5 and "stack.json" in ended.err, other
    (state / "stack.json").write_text(json.dumps(record))
    assert weightlab("remove", "model", "--all").code == 0
    assert os.listdir("model") == [names[0]]
