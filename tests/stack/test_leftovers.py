"""What a killed run leaves is removed by the next command that changes or looks; a record is dropped whole or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.tools import content
from tests.files.test_temporary import killed_at
from weightlab.errors import StackError

STEP = 1 if os.environ.get("WEIGHTLAB_TORTURE") else 3
"""Every operation is the last one of a killed run, or every third."""
LONG = "k" * 233 + ".safetensors"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: patches `p` and `q`, and `clean`, a model of one file."""
    monkeypatch.chdir(tmp_path)
    base = {"w": torch.ones(8, 8), "v": torch.zeros(5)}
    os.mkdir("clean")
    save_file(base, "clean/model.safetensors")
    wl.diff(base, base | {"w": base["w"] + 1}, "p.safetensors", encode="dense")
    wl.diff(base, base | {"v": base["v"] + 1}, "q.safetensors", encode="dense")
    return tmp_path


def fresh(name: str = "model.safetensors") -> Path:
    shutil.rmtree("model", ignore_errors=True)
    Path("other.safetensors").unlink(missing_ok=True)
    os.mkdir("model")
    shutil.copyfile("clean/model.safetensors", f"model/{name}")
    return Path("model", name)


@pytest.mark.parametrize("linked", ["symbolic", "hard"])
def test_kills_while_links_are_copied(place: Path, linked: str) -> None:
    first = Path("clean/model.safetensors").read_bytes()
    count = 1
    while True:
        file = fresh()
        file.rename("other.safetensors")
        os.symlink("../other.safetensors", file) if linked == "symbolic" else os.link("other.safetensors", file)
        if not killed_at(count, lambda: wl.apply("model", "p.safetensors", in_place=True, links="copy")):
            break
        on = wl.status("model").patches
        assert Path("other.safetensors").read_bytes() == first
        left = {path for path in content(Path("model")) if path.endswith((".partial", ".copy"))}
        assert not left, (count, left)
        assert sorted(os.listdir("model")) == [".weightlab", "model.safetensors"][not on :]
        if on:
            wl.remove("model", everything=True)
        else:
            wl.apply("model", "p.safetensors", in_place=True, links="copy")
            wl.remove("model", everything=True)
        assert os.listdir("model") == ["model.safetensors"]
        assert file.read_bytes() == first
        count += STEP
    assert count > 30


CHANGES: dict[str, Callable[[], object]] = {
    "the first goes on": lambda: wl.apply("model", "p.safetensors", in_place=True),
    "a second goes on": lambda: wl.apply("model", "q.safetensors", in_place=True),
    "one comes off": lambda: wl.remove("model", "p.safetensors"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(
    ("then", "name"), [("status", LONG), ("change", "model.safetensors")], ids=["status", "change"]
)
def test_kills_of_changes(place: Path, what: str, then: str, name: str) -> None:
    """Each file that is in the folder afterwards is one of a run that was not killed."""
    usual: dict[int, set[str]] = {}
    for on in (0, 1, 2):
        fresh(name)
        for patch in ("p.safetensors", "q.safetensors")[:on]:
            wl.apply("model", patch, in_place=True)
        usual[on] = {path.split("/originals/")[0].split("/patches/")[0] for path in content(Path("model"))}
    count = 1
    while True:
        fresh(name)
        if not what.startswith("the first"):
            wl.apply("model", "p.safetensors", in_place=True)
        if not killed_at(count, CHANGES[what]):
            break
        if then == "change":
            with suppress(StackError):  # it is on already; what was left is gone by then
                wl.apply("model", "q.safetensors", in_place=True)
        on = len(wl.status("model", dry_run=then == "change").patches)
        found = {path.split("/originals/")[0].split("/patches/")[0] for path in content(Path("model"))}
        assert found == usual[on], count
        kept = Path("model/.weightlab").rglob("*.bin")
        assert len(list(kept)) <= on
        wl.remove("model", everything=True) if on else None
        assert os.listdir("model") == [name]
        assert Path("model", name).read_bytes() == Path("clean/model.safetensors").read_bytes()
        count += STEP
    assert count > 12


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "interrupted"])
def test_a_record_is_dropped_whole_or_not(place: Path, begun: bool) -> None:
    count, outcomes = 1, set()
    while True:
        file = fresh()
        wl.apply("model", "p.safetensors", in_place=True)
        patched = file.read_bytes()
        if begun:
            assert killed_at(12, lambda: wl.apply("model", "q.safetensors", in_place=True))
        record = content(Path("model/.weightlab"))
        if not killed_at(count, lambda: wl.remove("model", drop_record=True)):
            break
        whole = content(Path("model/.weightlab")) == record if Path("model/.weightlab").exists() else False
        if not whole:
            assert wl.status("model").patches == []
            assert os.listdir("model") == ["model.safetensors"], "and what is left of it is gone"
            assert file.read_bytes() == patched
        else:
            assert [p.name for p in wl.status("model").patches] == ["p.safetensors"]
            wl.remove("model", everything=True)
            assert file.read_bytes() == Path("clean/model.safetensors").read_bytes()
        outcomes.add(whole)
        count += 1
    assert not Path("model/.weightlab").exists()
    assert False in outcomes and count >= 4


@pytest.mark.parametrize("empty", [".weightlab", ".weightlab/model.safetensors.stack/originals"])
def test_empty_folders(place: Path, empty: str) -> None:
    fresh()
    os.makedirs(f"model/{empty}")
    assert wl.status("model", dry_run=True).patches == []
    assert Path("model", empty).is_dir(), "looking only writes nothing"
    wl.status("model")
    assert os.listdir("model") == ["model.safetensors"]


@pytest.mark.parametrize("length", [229, 238, 240, 241, 249, 250, 255])
def test_names_up_to_the_longest(place: Path, length: int) -> None:
    name = "k" * (length - 12) + ".safetensors"
    for changes in (False, True):
        file = fresh(name)
        wl.apply("model", "p.safetensors", in_place=True)
        state = f"{name}.stack" if length <= 249 else f"{'k' * 216}~"
        assert [n.startswith(state) for n in os.listdir("model/.weightlab")] == [True]
        assert wl.status("model").intact and wl.verify(file).clean is not None
        wl.apply("model", out="out")
        assert sorted(os.listdir("out")) == [name]
        shutil.rmtree("out")
        if changes:
            wl.scale(file, "p.safetensors", 0.5)
            wl.apply(file, "q.safetensors", in_place=True)
            wl.remove("model", ["q.safetensors", "p.safetensors"])
        else:
            wl.remove("model", everything=True)
        assert os.listdir("model") == [name]
        assert file.read_bytes() == Path("clean/model.safetensors").read_bytes()
    wl.apply("model", "p.safetensors", in_place=True)
    wl.remove(file, drop_record=True)
    assert os.listdir("model") == [name]


def test_long_names_of_shards_and_two_that_begin_alike(place: Path) -> None:
    names = ["k" * 242 + end + ".safetensors" for end in "ab"]
    fresh(names[0])
    shutil.copyfile("clean/model.safetensors", f"model/{names[1]}")
    for name in names:
        wl.apply(f"model/{name}", "p.safetensors", in_place=True)
    assert len(os.listdir("model/.weightlab")) == 2
    os.unlink(f"model/{names[0]}")
    with pytest.raises(wl.WeightlabError, match="something else changed it"):
        wl.remove(f"model/{names[0]}", everything=True)
    wl.remove(f"model/{names[0]}", drop_record=True)
    assert [p.name for p in wl.status(f"model/{names[1]}").patches] == ["p.safetensors"]
    wl.remove(f"model/{names[1]}", everything=True)
    assert os.listdir("model") == [names[1]]
