"""`weightlab compose`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content, same, weights
from tests.patches.tools import state


@pytest.fixture
def more(patches: Path, weightlab: Weightlab) -> Path:
    """The same with `small.safetensors`, another dense patch from `base` to `tuned`, on two layers only."""
    words = ("--encode", "dense", "--include", "layers.*")
    assert weightlab("diff", "base", "tuned", "-o", "small.safetensors", *words).code == 0
    return patches


def test_a_sum_with_scales(weightlab: Weightlab, more: Path) -> None:
    ended = weightlab("compose", "dense.safetensors@0.5", "small.safetensors@-2", "-o", "sum.safetensors")
    patch = wl.open_patch("sum.safetensors")
    assert ended.code == 0 and ended.out.splitlines()[-1] == f"sum.safetensors: 5 tensors, 5.32 kB, id {patch.id[:12]}"
    assert weightlab("apply", "base", "sum.safetensors", "-o", "new").code == 0
    first, second, third = state(), state(1, 0.01), state(2, 0.1)
    for name, tensor in weights("new").items():
        expected = first[name] + 0.5 * (third[name] - first[name]) if tensor.is_floating_point() else first[name]
        if name.startswith("layers."):
            expected = expected - 2 * (second[name] - first[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_what_is_said_as_json(weightlab: Weightlab, more: Path) -> None:
    words = ("compose", "dense.safetensors@0.5", "small.safetensors", "-o", "sum.safetensors", "--json")
    told = weightlab(*words, "--license", "mit", "--notes", "a note").json
    assert (told["path"], told["kind"], told["tensors"], told["license"]) == ("sum.safetensors", "composed", 5, "mit")
    assert told["id"] == wl.open_patch("sum.safetensors").id
    parts = {p["id"]: p["scale"] for p in told["method"]["parameters"]["patches"]}
    assert parts == {wl.open_patch("dense.safetensors").id: 0.5, wl.open_patch("small.safetensors").id: 1.0}


def test_the_order_does_not_matter(weightlab: Weightlab, more: Path) -> None:
    operands = ("dense.safetensors@0.5", "small.safetensors")
    assert weightlab("compose", *operands, "-o", "one.safetensors").code == 0
    assert weightlab("compose", *reversed(operands), "-o", "two.safetensors").code == 0
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_the_way_back(weightlab: Weightlab, patches: Path) -> None:
    """An exact patch, negated, goes on the tuned model and gives the base bit for bit."""
    words = ("compose", "exact.safetensors@-1", "-o", "back.safetensors")
    ended = weightlab(*words)
    assert ended.code == 2 and "give --base" in ended.err and not (patches / "back.safetensors").exists()
    assert weightlab(*words, "--base", "base").code == 0
    assert weightlab("apply", "tuned", "back.safetensors", "-o", "new").code == 0
    assert same(weights("new"), weights("base"))


def test_encodings_and_choice_of_tensors(weightlab: Weightlab, more: Path) -> None:
    words = ("--encode", "quantized:8", "--encode", "*.bias=dense", "--include", "layers.0.*")
    told = weightlab("compose", "dense.safetensors", "small.safetensors", "-o", "q", *words, "--json").json
    assert {n: held["tensors"] for n, held in told["encodings"].items()} == {"quantized": 1, "dense": 1}
    assert told["largest_relative_error"] > 0 and (more / "q" / "patch.safetensors").exists()


def test_a_dry_run_leaves_nothing(weightlab: Weightlab, more: Path) -> None:
    before = content(more)
    words = ("compose", "dense.safetensors", "small.safetensors", "-o", "sum.safetensors", "--json")
    told = weightlab(*words, "--dry-run").json
    assert content(more) == before
    made = weightlab(*words).json
    assert told.pop("dry_run") and told.pop("memory") > 2**28 and not made.pop("dry_run")
    assert told == made


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("dense.safetensors",), 2),
        (("-o", "new.safetensors"), 2),
        (("dense.safetensors", "dense.safetensors@2", "-o", "new.safetensors"), 2),
        (("exact.safetensors", "dense.safetensors", "-o", "new.safetensors"), 2),
        (("dense.safetensors", "-o", "new.safetensors", "--encode", "exact"), 2),
        (("dense.safetensors", "nothing", "-o", "new.safetensors"), 3),
        (("base", "-o", "new.safetensors"), 3),
        (("exact.safetensors", "-o", "new.safetensors", "--base", "tuned"), 4),
        (("dense.safetensors", "-o", "small.safetensors"), 4),
        (("dense.safetensors", "-o", "small.safetensors", "--dry-run"), 4),
        (("dense.safetensors", "-o", "no/such/folder"), 7),
    ],
)
def test_what_makes_no_sense(weightlab: Weightlab, more: Path, words: tuple[str, ...], code: int) -> None:
    before = content(more)
    ended = weightlab("compose", *words)
    assert ended.code == code and len(ended.err.splitlines()) >= 2
    assert content(more) == before
