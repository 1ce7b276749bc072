"""`weightlab remove`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import state


@pytest.fixture
def clean(patches: Path) -> dict[str, str]:
    """What is in `base` before anything is on it."""
    return content(patches / "base")


@pytest.fixture
def two_on(clean: dict[str, str], patches: Path, weightlab: Weightlab) -> Path:
    """A model with both patches on."""
    words = ("exact.safetensors", "dense.safetensors@0.5")
    assert weightlab("apply", "base", *words, "--in-place").code == 0
    return patches / "base"


def names(weightlab: Weightlab) -> list[str]:
    return sorted(p["name"] for p in weightlab("status", "base", "--json").json["patches"])


def test_one_after_the_other_in_any_order(weightlab: Weightlab, two_on: Path, clean: dict[str, str]) -> None:
    ended = weightlab("remove", "base", "exact.safetensors")
    assert ended.code == 0 and names(weightlab) == ["dense.safetensors"]
    assert ended.out.splitlines()[0] == "5 tensors computed, 5.32 kB written"
    ended = weightlab("remove", "base", "dense.safetensors")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "base: no patch is on"
    assert content(two_on) == clean


@pytest.mark.parametrize("words", [("--all",), ("exact.safetensors", "dense.safetensors")])
def test_all_at_once(weightlab: Weightlab, two_on: Path, clean: dict[str, str], words: tuple[str, ...]) -> None:
    assert weightlab("remove", "base", *words).code == 0
    assert content(two_on) == clean


def test_the_file_may_be_gone(weightlab: Weightlab, two_on: Path, clean: dict[str, str]) -> None:
    identity = wl.open_patch("dense.safetensors").id
    for name in ("exact.safetensors", "dense.safetensors"):
        Path(name).unlink()
    assert weightlab("remove", "base", "some/where/exact.safetensors").code == 0
    ended = weightlab("remove", "base", identity[:3])
    assert ended.code == 4 and "no such patch is on" in ended.err
    assert weightlab("remove", "base", identity[:8]).code == 0
    assert content(two_on) == clean


def test_the_file_may_have_another_name(weightlab: Weightlab, two_on: Path) -> None:
    Path("exact.safetensors").rename("renamed.safetensors")
    assert weightlab("remove", "base", "renamed.safetensors").code == 0
    assert names(weightlab) == ["dense.safetensors"]


def test_a_patch_that_is_not_on_and_what_is(weightlab: Weightlab, two_on: Path) -> None:
    before = content(two_on)
    ended = weightlab("remove", "base", "exact.safetensors", "nothing.safetensors", "more")
    assert ended.code == 4
    lines = ended.err.splitlines()
    assert lines[1:3] == ["  nothing.safetensors: is not on", "  more: is not on"]
    assert "exact.safetensors" in lines[3] and "dense.safetensors" in lines[3] and "at 0.5" in lines[3]
    assert content(two_on) == before
    assert weightlab("remove", "tuned", "exact.safetensors").code == 4


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--all", "--forget"),
        ("exact.safetensors", "--all"),
        ("exact.safetensors", "--forget"),
        ("exact.safetensors@0.5",),
        ("--forget", "--dry-run"),
    ],
)
def test_what_makes_no_sense(weightlab: Weightlab, two_on: Path, words: tuple[str, ...]) -> None:
    before = content(two_on)
    ended = weightlab("remove", "base", *words)
    assert ended.code == 2 and len(ended.err.splitlines()) == 2
    assert content(two_on) == before


def test_a_dry_run_writes_nothing(weightlab: Weightlab, two_on: Path) -> None:
    before = content(two_on)
    told = weightlab("remove", "base", "--all", "--dry-run", "--json").json
    assert told["patches"] == [] and told["tensors"] == 5 and told["dry_run"] and told["memory"] > 2**28
    assert content(two_on) == before


def test_files_that_something_else_changed_are_left_alone(weightlab: Weightlab, two_on: Path) -> None:
    changed = state(5, 1.0)
    save_file(changed, two_on / "model.safetensors")
    before = content(two_on)
    for words in (("--all",), ("exact.safetensors",)):
        ended = weightlab("remove", "base", *words)
        assert ended.code == 5 and "--forget" in ended.err
    assert content(two_on) == before


def test_forget_keeps_the_files_and_drops_the_record(weightlab: Weightlab, two_on: Path) -> None:
    before = content(two_on)
    ended = weightlab("remove", "base", "--forget")
    assert ended.code == 0 and "model.safetensors: its kept clean bytes and patches are removed" in ended.out
    assert content(two_on) == {n: d for n, d in before.items() if not n.startswith(".weightlab")}
    assert names(weightlab) == []


def test_one_of_two_models_in_a_folder(weightlab: Weightlab, patches: Path) -> None:
    shutil.copy("base/model.safetensors", "base/twin.safetensors")
    before = content(patches / "base")
    for model in ("base/model.safetensors", "base/twin.safetensors"):
        assert weightlab("apply", model, "dense.safetensors", "--in-place").code == 0
    assert weightlab("remove", "base/twin.safetensors", "--all").code == 0
    assert weightlab("status", "base/twin.safetensors", "--json").json["patches"] == []
    assert len(weightlab("status", "base/model.safetensors", "--json").json["patches"]) == 1
    assert weightlab("remove", "base/model.safetensors", "--all").code == 0
    assert content(patches / "base") == before


def test_missing_models(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("remove", "nothing", "--all").code == 3
    assert weightlab("remove", "nothing", "--forget").code == 3
    assert weightlab("remove", "org/model", "--all").code == 3
