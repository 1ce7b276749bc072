"""`weightlab scale`."""

from __future__ import annotations

from pathlib import Path

import pytest

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content


@pytest.fixture
def one_on(patches: Path, weightlab: Weightlab) -> Path:
    """A model with `dense.safetensors` on at 0.5."""
    assert weightlab("apply", "base", "dense.safetensors@0.5", "--in-place").code == 0
    return patches / "base"


@pytest.mark.parametrize(
    ("words", "scale"),
    [
        (("2",), 2.0),
        (("-1",), -1.0),
        (("-0.25",), -0.25),
        (("-1e-3",), -0.001),
        (("-.5",), -0.5),
        (("0",), 0.0),
        (("-2", "--json"), -2.0),
        (("--json", "-2"), -2.0),
        (("--json", "--", "-2"), -2.0),
        (("--wait", "3", "-2"), -2.0),
    ],
)
def test_the_scale_is_a_number_also_when_it_is_negative(
    weightlab: Weightlab, one_on: Path, words: tuple[str, ...], scale: float
) -> None:
    assert weightlab("scale", "base", "dense.safetensors", *words).code == 0
    assert weightlab("apply", "tuned", f"dense.safetensors@{scale}", "--in-place").code == 0
    (patch,) = weightlab("status", "base", "--json").json["patches"]
    assert patch["scale"] == pytest.approx(scale, rel=1e-7)


@pytest.mark.parametrize("scale", ["0.75", "-0.75"])
def test_both_ways_of_writing_it_give_the_model_that_apply_gives(
    weightlab: Weightlab, one_on: Path, scale: str
) -> None:
    assert weightlab("scale", "base", "dense.safetensors", scale).code == 0
    first = (one_on / "model.safetensors").read_bytes()
    assert weightlab("scale", "base", "dense.safetensors", "3").code == 0
    assert (one_on / "model.safetensors").read_bytes() != first
    ended = weightlab("scale", "base", f"dense.safetensors@{scale}")
    assert ended.code == 0 and ended.out.splitlines()[-1].split()[1] == scale
    assert (one_on / "model.safetensors").read_bytes() == first
    assert weightlab("remove", "base", "--all").code == 0
    assert weightlab("apply", "base", f"dense.safetensors@{scale}", "--in-place").code == 0
    assert (one_on / "model.safetensors").read_bytes() == first


def test_the_file_may_be_gone(weightlab: Weightlab, one_on: Path) -> None:
    identity = wl.open_patch("dense.safetensors").id
    Path("dense.safetensors").unlink()
    for words in (("dense.safetensors", "2"), ("dense.safetensors@3",), (identity[:6], "4"), (f"{identity[:6]}@5",)):
        assert weightlab("scale", "base", *words).code == 0
    assert weightlab("status", "base", "--json").json["patches"][0]["scale"] == 5


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("dense.safetensors",), "give a number after it"),
        (("dense.safetensors", "much"), "give a finite number"),
        (("dense.safetensors", "nan"), "give a finite number"),
        (("dense.safetensors", "-inf"), "give a finite number"),
        (("dense.safetensors", "1e39"), ""),
        (("dense.safetensors", "1", "2"), "see weightlab scale --help"),
        (("dense.safetensors", "1", "-2"), "see weightlab scale --help"),
        (("dense.safetensors", "-1", "--jsn"), "see weightlab scale --help"),
        (("dense.safetensors", "-x"), "see weightlab scale --help"),
        (("hf://org/name@0.5",), "hf://org/name@main@0.5"),
    ],
)
def test_what_makes_no_sense(weightlab: Weightlab, one_on: Path, words: tuple[str, ...], remedy: str) -> None:
    before = content(one_on)
    ended = weightlab("scale", "base", *words)
    assert ended.code == 2 and remedy in ended.err.splitlines()[-1]
    assert content(one_on) == before


@pytest.mark.parametrize("words", [("exact.safetensors", "2"), ("dense.safetensors@1", "2"), ("nothing@2",)])
def test_a_patch_that_is_not_on(weightlab: Weightlab, one_on: Path, words: tuple[str, ...]) -> None:
    before = content(one_on)
    ended = weightlab("scale", "base", *words)
    assert ended.code == 4 and "what is on: dense.safetensors" in ended.err
    assert content(one_on) == before


def test_a_dry_run_writes_nothing(weightlab: Weightlab, one_on: Path) -> None:
    before = content(one_on)
    told = weightlab("scale", "base", "dense.safetensors", "-1", "--dry-run", "--json").json
    assert told["patches"][0]["scale"] == -1 and told["dry_run"] and told["tensors"] == 5 and told["memory"] > 2**28
    assert content(one_on) == before


def test_the_scale_that_it_has(weightlab: Weightlab, one_on: Path) -> None:
    before = content(one_on)
    ended = weightlab("scale", "base", "dense.safetensors", "0.5")
    assert ended.code == 0 and "nothing to change" in ended.out
    assert content(one_on) == before
