"""SIGKILL at random moments: the next command finds the model as before or as after, never between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import weightlab as wl

KILLS = 200
ROOT = Path(__file__).parents[2]


class Victims:
    """Starts changes in child processes that can be killed."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victim.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders, self.answers = self.process.stdin, self.process.stdout
        assert self._answer() == "ready"

    def _answer(self) -> str:
        return self.answers.readline().strip()

    def run(self, verb: str, model: Path, patch: Path, scale: float, kill_after: float | None) -> float:
        """Lets a child make a change, kills it after so many seconds; returns how long it lived."""
        order = {"verb": verb, "model": str(model), "patch": str(patch), "scale": scale}
        print(json.dumps(order), file=self.orders, flush=True)
        child, begun = int(self._answer()), time.monotonic()
        if kill_after is not None and not select.select([self.answers], [], [], kill_after)[0]:
            with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                os.kill(child, signal.SIGKILL)
        assert self._answer() == "ended"
        return time.monotonic() - begun

    def close(self) -> None:
        with self.process:  # closes both pipes and waits
            pass


@pytest.fixture
def victims() -> Iterator[Victims]:
    started = Victims()
    yield started
    started.close()


def _model(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weight_map = {}
    for index in range(3):
        name = f"model-{index + 1:05d}-of-00003.safetensors"
        tensors = {
            f"layers.{index}.{k}": torch.randn(300, 400, generator=generator).bfloat16() for k in ("a", "b", "c")
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("model-*.safetensors"))}


def _loaded(folder: Path) -> Mapping[str, bytes] | None:
    """What a loader would take for the model: all the shards that the index lists, or nothing."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    try:
        for name in sorted(set(index["weight_map"].values())):
            load_file(folder / name)
    except (OSError, SafetensorError):
        return None
    return _weights(folder)


def _patches(folder: Path, model: Path) -> list[Path]:
    state = {n: t for f in sorted(model.glob("*.safetensors")) for n, t in load_file(f).items()}
    generator = torch.Generator().manual_seed(2)
    made = []
    for number, (encode, part) in enumerate((("exact", "*"), ("dense:fp32", "*.a"), ("low_rank:2", "layers.1.*"))):
        tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator).bfloat16() for n, t in state.items()}
        made.append(folder / f"{number}.safetensors")
        wl.diff(state, tuned, made[-1], encode=encode, include=[part])
    return made


def test_two_hundred_kills_in_place(tmp_path: Path, victims: Victims) -> None:
    model = _model(tmp_path / "model")
    patches = _patches(tmp_path, model)
    generator = random.Random(0)
    reference: dict[frozenset[tuple[int, float]], dict[str, bytes]] = {frozenset(): _weights(model)}

    def expected(on: Mapping[int, float]) -> dict[str, bytes]:
        key = frozenset(on.items())
        if key not in reference:
            out = tmp_path / "reference"
            clean = _model(tmp_path / "clean")
            wl.apply(clean, [wl.open_patch(patches[i]).at(s) for i, s in on.items()], out=out)
            reference[key] = _weights(out)
            shutil.rmtree(out)
            shutil.rmtree(clean)
        return reference[key]

    on: dict[int, float] = {}
    took = victims.run("apply", model, patches[0], 1.0, None)
    on[0] = 1.0
    assert _weights(model) == expected(on)
    went_on = went_back = recovered = 0
    for _ in range(KILLS):
        choice = generator.randrange(len(patches))
        scale = generator.choice((1.0, 0.5, -1.0))
        verb = generator.choice(("scale", "remove")) if choice in on else "apply"
        wanted = dict(on)
        if verb == "remove":
            del wanted[choice]
        else:
            wanted[choice] = scale
        lived = victims.run(verb, model, patches[choice], scale, generator.uniform(0, 1.3 * took))
        before, after = expected(on), expected(wanted)
        loaded = _loaded(model)
        assert loaded is None or loaded in (before, after), "a mixture loads"
        status = wl.status(model)
        recovered += bool(status.notes)
        assert status.intact
        found = {patches.index(tmp_path / p.name): p.scale for p in status.patches}
        assert found in (on, wanted)
        assert _weights(model) == expected(found)
        went_on += found == wanted != on
        went_back += found == on != wanted
        # Those that go on are the quick ones: by them alone kills would come earlier and earlier.
        took = took + 0.2 * (lived - took) if found == wanted else 1.05 * took
        on = found
    assert went_on > 10
    assert went_back > 10
    assert recovered > 5, "no kill hit the middle of a change"
    wl.remove(model, everything=True) if on else None
    assert _weights(model) == expected({})
    assert not (model / ".weightlab").exists()


def test_kills_while_a_new_checkpoint_is_written(tmp_path: Path, victims: Victims) -> None:
    model = _model(tmp_path / "model")
    patch = _patches(tmp_path, model)[0]
    clean = _weights(model)
    out = tmp_path / "out"
    took = victims.run(str(out), model, patch, 1.0, None)
    whole = _weights(out)
    shutil.rmtree(out)
    generator = random.Random(1)
    absent = 0
    for _ in range(20):
        victims.run(str(out), model, patch, 1.0, generator.uniform(0, took))
        assert _weights(model) == clean
        if out.exists():
            assert _weights(out) == whole
            shutil.rmtree(out)
        else:
            absent += 1
    assert absent
    wl.apply(model, patch, out=out)
    assert _weights(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")) == []
