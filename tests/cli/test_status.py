"""`weightlab status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content, same, weights
from tests.patches.tools import state
from weightlab.stack import journal, transaction


def test_nothing_is_on(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("status", "base")
    assert (ended.code, ended.out) == (0, "base: no patch is on\n")
    told = weightlab("status", "other.safetensors", "--json").json
    assert told == {
        "model": "other.safetensors",
        "patches": [],
        "tensors": 0,
        "kept_bytes": 0,
        "intact": True,
        "notes": [],
    }


def test_what_is_on(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "dense.safetensors@-0.5", "--in-place").code == 0
    ended = weightlab("status", "base")
    assert ended.code == 0
    title, _, *rows, last = ended.out.splitlines()
    assert title == "on base" and last == "5 tensors touched, 5.32 kB of clean bytes kept"
    identities = {n: wl.open_patch(n).id for n in ("exact.safetensors", "dense.safetensors")}
    assert sorted(tuple(row.split()) for row in rows) == [
        ("dense.safetensors", "-0.5", identities["dense.safetensors"][:12]),
        ("exact.safetensors", "1", identities["exact.safetensors"][:12]),
    ]
    told = weightlab("status", "base", "--json").json
    assert {p["name"]: p["id"] for p in told["patches"]} == identities
    assert (told["tensors"], told["kept_bytes"], told["intact"]) == (5, 5316, True)


def test_looking_writes_nothing(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    before = content(patches)
    for words in ((), ("--dry-run",), ("--json",)):
        assert weightlab("status", "base", *words).code == 0
    assert content(patches) == before


def test_files_that_something_else_changed_are_exit_5(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    save_file(state(7, 1.0), patches / "base" / "model.safetensors")
    before = content(patches)
    ended = weightlab("status", "base")
    assert ended.code == 5 and "something else changed it" in ended.out and "--forget" in ended.out
    ended = weightlab("status", "base", "--json")
    assert ended.code == 5 and not ended.json["intact"] and len(ended.json["patches"]) == 1
    assert content(patches) == before


@pytest.fixture
def interrupted(patches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the middle of a change, as a power cut leaves it."""

    def cut(*_: Any, **__: Any) -> None:
        raise RuntimeError("the power is cut")

    with monkeypatch.context() as during:
        during.setattr(journal, "commit", cut)
        during.setattr(transaction._Change, "_go_back", lambda *_: None)
        with pytest.raises(RuntimeError, match="power"):
            wl.apply("base", "exact.safetensors", in_place=True)
    assert list((patches / "base").glob("*.weightlab-busy"))
    return patches


def test_an_interrupted_change_is_undone(weightlab: Weightlab, interrupted: Path) -> None:
    ended = weightlab("status", "base")
    assert ended.code == 0
    assert ended.out.splitlines() == ["base: no patch is on", "model.safetensors: undid a change that was interrupted"]
    assert same(weights("base"), state())
    assert sorted(f.name for f in (interrupted / "base").iterdir()) == ["config.json", "model.safetensors"]


def test_a_dry_run_says_that_there_is_one_and_leaves_it(weightlab: Weightlab, interrupted: Path) -> None:
    before = content(interrupted)
    ended = weightlab("status", "base", "--dry-run")
    assert ended.code == 5 and "weightlab status base" in ended.err.splitlines()[-1]
    for words in (
        ("inspect", "base"),
        ("verify", "base"),
        ("diff", "base", "tuned"),
        ("apply", "base", "exact.safetensors", "-o", "new"),
        ("apply", "base", "exact.safetensors", "--in-place", "--dry-run"),
    ):
        assert weightlab(*words).code == 5
    assert content(interrupted) == before


def test_the_next_change_undoes_it_too(weightlab: Weightlab, interrupted: Path) -> None:
    ended = weightlab("apply", "base", "dense.safetensors", "--in-place")
    assert ended.code == 0 and "undid a change that was interrupted" in ended.out
    assert [p["name"] for p in weightlab("status", "base", "--json").json["patches"]] == ["dense.safetensors"]


@pytest.mark.parametrize("path", ["nothing", "org/model", "base/nothing.safetensors"])
def test_no_model(weightlab: Weightlab, place: Path, path: str) -> None:
    assert weightlab("status", path).code == 3
