"""A patch gives the same bits whatever the processor can do and however many threads there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.files.digest import fingerprint
from weightlab.ops.operands import reading
from weightlab.patches.compute import digest_tensors
from weightlab.stream.executor import Resources

ENCODINGS = ["exact", "dense:bf16", "quantized:4:channel", "quantized:5:tanh", "sparse:0.3", "low_rank:12", "sign"]
SCALES = [1.0, 0.3, -1.7]

APPLY = """
import json, sys, torch, weightlab as wl
from pathlib import Path
from weightlab.files.digest import fingerprint
from weightlab.patches.compute import digest_tensors
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources
from safetensors.torch import load_file

folder, threads = Path(sys.argv[1]), int(sys.argv[2])
resources = Resources(threads=threads, memory=2**31)
base = load_file(folder / "base.safetensors")
found = {}
for path in sorted(folder.glob("patch-*.safetensors")):
    patch = wl.open_patch(path)
    for scale in json.loads(sys.argv[3]):
        source = MemorySource(wl.apply(base, patch.at(scale), resources=resources))
        found[f"{path.name}@{scale}"] = fingerprint(digest_tensors(source, source.specs, resources))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with tensors of all common dtypes and a patch in each encoding."""
    place = tmp_path_factory.mktemp("machine")
    generator = torch.Generator().manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        for shape in ((150, 4001), (77,), (9, 5, 3, 3)):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            name = f"{str(dtype)[6:]}.{len(shape)}"
            base[name] = values.to(dtype)
            tuned[name] = (values + 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    save_file(base, place / "base.safetensors")
    for index, encode in enumerate(ENCODINGS):
        wl.diff(base, tuned, place / f"patch-{index}.safetensors", encode=encode)
    return place


def applied(folder: Path, capability: str, threads: int) -> dict[str, str]:
    command = [sys.executable, "-c", APPLY, str(folder), str(threads), json.dumps(SCALES)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    if not capability:
        environment.pop("ATEN_CPU_CAPABILITY")
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    found: dict[str, str] = json.loads(done.stdout)
    assert len(found) == len(ENCODINGS) * len(SCALES)
    return found


def test_the_same_bits_on_every_machine(folder: Path) -> None:
    here = applied(folder, "", 2)
    assert len(set(here.values())) == len(here)
    assert applied(folder, "default", 1) == here
    assert applied(folder, "avx2", 4) == here


def test_the_state_dict_and_the_file_agree(folder: Path, tmp_path: Path) -> None:
    wl.apply(folder / "base.safetensors", f"{folder / 'patch-5.safetensors'}@0.3", out=tmp_path / "out.safetensors")
    with reading(tmp_path / "out.safetensors") as source:
        digests = digest_tensors(source, source.specs, Resources())
    assert fingerprint(digests) == applied(folder, "", 2)["patch-5.safetensors@0.3"]
