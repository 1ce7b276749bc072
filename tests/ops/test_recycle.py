"""Recycling: the two algorithms with a training command whose outcome is known, cut off and gone on with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.errors import InputError, MalformedFileError, MissingInputError, NotPatchableError, UsageError
from weightlab.ops.recycle import Plan, steps_of

# Goes half of the way to 10, and writes down what it started with.
TRAIN = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
start, out = Path(sys.argv[1]), Path(sys.argv[2])
weight = load_file(start / "model.safetensors")["layer.weight"]
log = Path(__file__).with_name("log")
log.write_text((log.read_text() if log.exists() else "") + f"{weight[0, 0]:g} ")
if Path(__file__).with_name("fail").exists():
    out.mkdir()
    (out / "half").write_text("half")
    sys.exit(3)
out.mkdir()
save_file({"layer.weight": weight + (10 - weight) / 2}, out / "model.safetensors")
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with three releases: 0, 1 and 2 everywhere."""
    for n in range(3):
        (tmp_path / f"m{n}").mkdir()
        save_file({"layer.weight": torch.full((3, 4), float(n))}, tmp_path / f"m{n}" / "model.safetensors")
    (tmp_path / "train.py").write_text(TRAIN)
    write(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def write(path: Path, **changes: object) -> None:
    content = {
        "bases": ["m0", "m1", "m2"],
        "train": f"{sys.executable} train.py {{start}} {{out}}",
        "work": "work",
        "result": "result",
        "encode": "dense:fp32",
    }
    path.write_text(yaml.safe_dump(content | changes))


def value(folder: Path) -> float:
    weight = load_file(folder / "model.safetensors")["layer.weight"]
    assert bool((weight == weight[0, 0]).all())
    return float(weight[0, 0])


def log(plan: Path) -> list[float]:
    return [float(word) for word in plan.with_name("log").read_text().split()]


def test_the_steps_of_both_algorithms() -> None:
    options = {"bases": ["a", "b", "c"], "train": "{start}{out}", "work": "w", "result": "r"}
    assert [(s.name, s.base, s.after) for s in steps_of(Plan(**options))] == [
        ("1-tuned", 0, None),
        ("2-tuned", 1, "1-tuned"),
        ("3-tuned", 2, "2-tuned"),
    ]
    assert [(s.name, s.after) for s in steps_of(Plan(**options, algorithm="direct"))] == [
        ("1-plain", None),
        ("2-plain", None),
        ("2-tuned", "1-plain"),
        ("3-tuned", "2-plain"),
    ]


def test_iterative(plan: Path) -> None:
    done = wl.recycle(plan)
    # 0 → 5, Δ 5; 1 + 5 = 6 → 8, Δ 7; 2 + 7 = 9 → 9.5
    assert log(plan) == [0, 6, 9] and value(plan.with_name("result")) == 9.5
    assert done.ran == ["1-tuned", "2-tuned", "3-tuned"]
    left = sorted(p.name for p in plan.with_name("work").rglob("*") if p.is_file())
    assert left == ["change.safetensors", "change.safetensors", "plan.json"]  # only differences
    base = load_file(plan.with_name("m1") / "model.safetensors")
    assert wl.apply(base, plan.with_name("work") / "2-tuned" / "change.safetensors")["layer.weight"][0, 0] == 8


def test_direct(plan: Path) -> None:
    write(plan, algorithm="direct", scale=0.5)
    wl.recycle(plan)
    # plain: 0 → 5, 1 → 5.5; 1 + 2.5 = 3.5; 2 + 2.25 = 4.25 → 7.125
    assert log(plan) == [0, 1, 3.5, 4.25] and value(plan.with_name("result")) == 7.125


def test_it_goes_on_where_it_stopped(plan: Path) -> None:
    wl.recycle(plan, dry_run=True)
    assert not plan.with_name("work").exists()
    plan.with_name("fail").write_text("")
    with pytest.raises(InputError, match="ended with 3"):
        wl.recycle(plan)
    plan.with_name("fail").unlink()
    assert wl.recycle(plan).ran == ["1-tuned", "2-tuned", "3-tuned"]
    assert log(plan) == [0, 0, 6, 9]
    with pytest.raises(NotPatchableError, match="exists already"):
        wl.recycle(plan)


def test_a_later_step_that_failed_is_done_again_alone(plan: Path) -> None:
    class Cut(Exception):
        """Stands for a kill between two steps."""

    def say(text: str) -> None:
        if text.startswith("2-tuned: ["):
            raise Cut

    with pytest.raises(Cut):
        wl.recycle(plan, say=say)
    done = wl.recycle(plan)
    assert done.found == ["1-tuned"] and done.ran == ["2-tuned", "3-tuned"]
    assert log(plan) == [0, 6, 9] and value(plan.with_name("result")) == 9.5


def test_wrong_plans(plan: Path) -> None:
    with pytest.raises(MissingInputError):
        wl.recycle(plan.with_name("nowhere.yaml"))
    write(plan, train="python train.py {start}")
    with pytest.raises(UsageError, match=r"\{out\}"):
        wl.recycle(plan)
    write(plan, bases=["m0"], algorithm="sideways", extra=1)
    with pytest.raises(InputError) as caught:
        wl.recycle(plan)
    assert all(word in str(caught.value) for word in ("bases", "algorithm", "extra"))
    write(plan, bases=["m0", "nowhere/at/all"])
    with pytest.raises(MissingInputError, match="nowhere"):
        wl.recycle(plan)
    write(plan, train="no-such-command {start} {out}")
    with pytest.raises(UsageError, match="cannot be run"):
        wl.recycle(plan)


def test_work_of_another_plan_is_not_mixed_up(plan: Path) -> None:
    plan.with_name("fail").write_text("")
    with pytest.raises(InputError):
        wl.recycle(plan)
    write(plan, scale=0.5)
    with pytest.raises(NotPatchableError, match="another plan"):
        wl.recycle(plan)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", ".", "a/b", "", "x" * 300])
@pytest.mark.parametrize("key", ["work", "result"])
def test_work_and_result_are_plain_names_beside_the_plan(plan: Path, key: str, name: str) -> None:
    write(plan, **{key: name})
    before = sorted(plan.parent.parent.iterdir())
    for dry_run in (True, False):
        with pytest.raises(MalformedFileError, match="work and result"):
            wl.recycle(plan, dry_run=dry_run)
    assert sorted(plan.parent.parent.iterdir()) == before and not plan.with_name("log").exists()


@pytest.mark.parametrize("name", ["work", "result", "work/1-tuned", "work/2-tuned", "work/1-tuned/out"])
def test_links_in_the_places_of_a_plan_are_not_followed(plan: Path, name: str) -> None:
    victim = plan.with_name("victim")
    victim.mkdir()
    (victim / "precious").write_text("precious")
    (plan.parent / name).parent.mkdir(parents=True, exist_ok=True)
    (plan.parent / name).symlink_to(victim)
    with pytest.raises(NotPatchableError, match="links"):
        wl.recycle(plan)
    assert [p.name for p in victim.iterdir()] == ["precious"] and not plan.with_name("log").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 20_000, b"", b"{", b"[]", b"bases: 2001-13-45", b"&a a: [*a]"])
def test_what_is_no_plan(plan: Path, content: bytes) -> None:
    plan.write_bytes(content)
    with pytest.raises(MalformedFileError, match=r"plan\.yaml: ") as failed:
        wl.recycle(plan)
    assert failed.value.exit_code == 3


@pytest.mark.parametrize(
    ("train", "what"),
    [("x '{start} {out}", "No closing quotation"), ("x {start} {out} \0", "no command"), ("x {start}", "{out}")],
)
def test_a_command_that_none_can_run_is_refused_before_anything_is_done(plan: Path, train: str, what: str) -> None:
    write(plan, train=train)
    with pytest.raises(UsageError) as failed:
        wl.recycle(plan, dry_run=True)
    assert what in failed.value.message
    with pytest.raises(UsageError):
        wl.recycle(plan)
    assert not plan.with_name("work").exists()


@pytest.mark.parametrize("name", ["", "..", "../x", "/tmp/x", "a/b", "x" * 300, "a\0b"])
@pytest.mark.parametrize("key", ["work", "result"])
def test_work_and_result_lie_beside_the_plan(plan: Path, key: str, name: str) -> None:
    write(plan, **{key: name})
    with pytest.raises(MalformedFileError, match="not plain names"):
        wl.recycle(plan)


def test_work_and_result_are_two(plan: Path) -> None:
    write(plan, work="same", result="same")
    with pytest.raises(UsageError, match="'same'"):
        wl.recycle(plan)


@pytest.mark.parametrize("state", [b"{", b"[]", b"{}", b'{"plan": 3}', b"\xff", b"[" * 100_000])
def test_a_state_that_is_damaged(plan: Path, state: bytes) -> None:
    plan.with_name("work").mkdir()
    (plan.with_name("work") / "plan.json").write_bytes(state)
    with pytest.raises(MalformedFileError, match=r"plan\.json: "):
        wl.recycle(plan)
    assert sorted(p.name for p in plan.with_name("work").iterdir()) == ["plan.json"]
