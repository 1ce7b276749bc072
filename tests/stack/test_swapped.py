"""Another process swaps folders and files of a model for links while commands run: nothing outside changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import weightlab as wl
from tests.stack.hostile import around
from tests.stack.models import every_dtype, moved, write
from weightlab.files import disk

WHOLE = bool(os.environ.get("WEIGHTLAB_TORTURE"))
ROUNDS = 400 if WHOLE else 30
SWAPPER = Path(__file__).with_name("swapper.py")


@contextmanager
def swapping(place: Path, seed: int) -> Iterator[None]:
    with subprocess.Popen([sys.executable, str(SWAPPER), str(seed), str(place)], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.poll() is None, "it swapped to the end"
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


COMMANDS: list[Callable[[], object]] = [
    lambda: wl.status("model"),
    lambda: wl.apply("model", "q.safetensors", in_place=True),
    lambda: wl.remove("model", "q.safetensors"),
    lambda: wl.scale("model", "q.safetensors", 0.5),
    lambda: wl.verify("model"),
    lambda: wl.apply("model", "q.safetensors", in_place=True, links="copy"),
    lambda: wl.remove("model", everything=True),
    lambda: wl.apply("model", "p.safetensors", in_place=True),
    lambda: wl.remove("model", drop_record=True),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `clean`, patches `p` and `q`, and `victim`, which looks like a model with `p` on."""
    monkeypatch.chdir(tmp_path)
    base = every_dtype()
    for name in ("clean", "victim"):
        write(tmp_path / name, base)
    os.mkdir("aside")
    names = list(base)
    for patch, some in (("p", names[::2]), ("q", names[1::2])):
        write(tmp_path / f"tuned-{patch}", moved(base, [n for n in some if base[n][1]], 1))
        wl.diff("clean", f"tuned-{patch}", f"{patch}.safetensors")
    wl.apply("victim", "p.safetensors", in_place=True)
    state = Path("victim/.weightlab/model.safetensors.stack")
    for name in ("originals/9.bin", "originals/.8.bin.partial", f"patches/{'e' * 64}/x", "copies/0.copy"):
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_text("mine")
    return tmp_path


def seen() -> dict[str, tuple[object, ...]]:
    """What must stay. (How many names a file has is left out: patches that are kept are second names of theirs.)"""
    return {path: (*found[:2], *found[3:]) for path, found in around("victim", "clean").items()}


def lay_out(like: str) -> None:
    model = Path("model")
    if model.is_symlink():
        model.unlink()
    elif model.is_dir():
        shutil.rmtree(model)
    shutil.copytree(like, model)


def test_nothing_outside_changes(place: Path) -> None:
    before = seen()
    ended: Counter[str] = Counter()
    for number in range(ROUNDS):
        lay_out("victim" if number % 3 == 0 else "clean")
        with swapping(place, number):
            for command in COMMANDS:
                try:
                    command()
                    ended["done"] += 1
                except wl.WeightlabError as error:
                    ended[type(error).__name__] += 1
        assert seen() == before, number
    assert ended["done"] > ROUNDS, ended
    assert ended.total() - ended["done"] > ROUNDS, ended


SWAPPED = [
    "model",
    "model/.weightlab",
    "model/.weightlab/model.safetensors.stack",
    "model/.weightlab/model.safetensors.stack/originals",
    "model/.weightlab/model.safetensors.stack/patches",
    "model/model.safetensors",
]


class Swap:
    """An observer of operations that puts a link in the place of something after one of them."""

    def __init__(self, at: int, swapped: str, leads: str) -> None:
        self.at, self.swapped, self.leads, self.done = at, swapped, leads, 0

    def __call__(self, *_: object) -> None:
        self.done += 1
        if self.done == self.at and os.path.lexists(self.swapped):
            os.rename(self.swapped, "aside/it")
            os.symlink(self.leads, self.swapped)


@pytest.mark.parametrize("command", ["apply", "apply with copies", "remove", "forget"])
@pytest.mark.parametrize("swapped", SWAPPED)
def test_a_swap_after_any_operation(place: Path, swapped: str, command: str) -> None:
    """From that operation on a link stands there, also one in the place of the whole model's folder."""
    before = seen()
    path = Path(swapped)
    leads = os.path.abspath(Path("victim", *path.parts[1:]))
    for count in range(1, 1000, 1 if WHOLE else 5):
        lay_out("victim" if command in ("remove", "forget") else "clean")
        if command == "apply with copies":
            shutil.rmtree("linked", ignore_errors=True)
            os.rename("model", "linked")
            os.mkdir("model")
            os.symlink("../linked/model.safetensors", "model/model.safetensors")
        swap = Swap(count, swapped, leads)
        disk.observer = swap
        try:
            if command == "remove":
                wl.remove("model", everything=True)
            elif command == "forget":
                wl.remove("model", drop_record=True)
            else:
                wl.apply("model", "q.safetensors", in_place=True, links="copy")
            failed = False
        except wl.WeightlabError:
            failed = True
        finally:
            disk.observer = None
        assert not failed or swap.done >= count, "without a swap nothing fails"
        assert seen() == before, count
        if Path("aside/it").is_dir() and not Path("aside/it").is_symlink():
            shutil.rmtree("aside/it")
        elif os.path.lexists("aside/it"):
            os.unlink("aside/it")
        if swap.done < count:
            break
    assert 3 < count < 900
