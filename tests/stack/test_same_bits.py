"""Checkpoints on disk get the same bytes whatever the processor can do, however many threads there are, either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.stack.models import ENCODINGS
from weightlab.tensors.tiles import TILE

ROOT = Path(__file__).parents[2]
STEPS = """
import hashlib, json, shutil, sys, torch
from pathlib import Path
import weightlab as wl

folder, place, resources = Path(sys.argv[1]), Path(sys.argv[2]), wl.Resources(threads=int(sys.argv[3]), memory=2**31)
patches = [wl.open_patch(p) for p in sorted(folder.glob("patch-*.safetensors"))]
found = {}

def keep(what, model):
    shards = sorted(model.glob("*.safetensors"))
    found[what] = hashlib.sha256(b"".join(f.read_bytes() for f in shards)).hexdigest()

def out(what, on):
    wl.apply(folder / "model", on, out=place / "out", resources=resources)
    keep(what, place / "out")
    shutil.rmtree(place / "out")

model = shutil.copytree(folder / "model", place / "model")
keep("clean", model)
for patch in patches:
    name = patch.path.name
    for scale in (1.0, -0.3):
        out(f"out {name} {scale}", patch.at(scale))
        if scale == 1.0:
            wl.apply(model, patch, in_place=True, resources=resources)
        else:
            wl.scale(model, patch, scale, resources=resources)
        keep(f"in place {name} {scale}", model)
    wl.remove(model, patch, resources=resources)
    keep(f"removed {name}", model)
on = [p.at(0.1 * (i + 1)) for i, p in enumerate(patches)]
out("out all", on)
for patch in reversed(on):
    wl.apply(model, patch, in_place=True, resources=resources)
keep("in place all", model)
wl.remove(model, patches[::2], resources=resources)
keep("in place odd", model)
out("out odd", on[1::2])
wl.remove(model, everything=True, resources=resources)
keep("removed all", model)
print(json.dumps([torch.backends.cpu.get_cpu_capability(), found]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` in two shards with tensors over more than a tile, and a patch of each encoding."""
    place = tmp_path_factory.mktemp("bits")
    generator = torch.Generator().manual_seed(0)
    shapes = {
        torch.bfloat16: (150, TILE // 150 + 400),
        torch.float32: (64, 33),
        torch.float16: (TILE + 3,),
        torch.float8_e4m3fn: (50, 61),
        torch.float64: (9, 5, 3),
    }
    base, tuned = {}, {}
    for dtype, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = str(dtype).removeprefix("torch.")
        base[name] = values.to(dtype)
        tuned[name] = (values + 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    (place / "model").mkdir()
    weight_map = {}
    for index in range(2):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        names = sorted(base)[index::2]
        save_file({n: base[n] for n in names}, place / "model" / file)
        weight_map |= dict.fromkeys(names, file)
    index_file = place / "model" / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, encode in enumerate(ENCODINGS):
        wl.diff(base, tuned, place / f"patch-{number}.safetensors", encode=encode)
    return place


def bytes_of(folder: Path, place: Path, capability: str, threads: int) -> dict[str, str]:
    """{step: SHA-256 of all shards}, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": capability}
    if not capability:
        del environment["ATEN_CPU_CAPABILITY"]
    place.mkdir()
    command = [sys.executable, "-c", STEPS, str(folder), str(place), str(threads)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    used, found = json.loads(done.stdout)
    assert used == "DEFAULT" or not capability
    return dict(found)


def test_the_same_bytes_everywhere(folder: Path, tmp_path: Path) -> None:
    here = bytes_of(folder, tmp_path / "four", "", 4)
    assert bytes_of(folder, tmp_path / "one", "", 1) == here
    assert bytes_of(folder, tmp_path / "default", "default", 4) == here
    for step, digest in here.items():
        if step.startswith("in place"):
            assert here.get(step.replace("in place", "out")) == digest, step
        elif step.startswith("removed"):
            assert digest == here["clean"], step
    assert len({d for s, d in here.items() if s.startswith("out")}) == 2 * len(ENCODINGS) + 2
