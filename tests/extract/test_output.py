"""Output is whole or absent, and making it takes no more memory for larger models."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from weightlab.errors import NotPatchableError
from weightlab.extract import diff as module


@pytest.mark.parametrize("place", ["p.safetensors", "folder"])
def test_output_that_exists_is_refused_before_anything_is_read(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "mine").touch()
    with pytest.raises(NotPatchableError):
        wl.diff({"w": torch.zeros(1)}, {"v": torch.zeros(1)}, tmp_path / place)


@pytest.mark.parametrize("place", ["p.safetensors", "folder", None])
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_: object) -> None:
        assert any(tmp_path.iterdir())  # it is half-way indeed
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        wl.diff(
            {"w": torch.zeros(9)}, {"w": torch.ones(9)}, None if place is None else tmp_path / place, encode="dense"
        )
    gc.collect()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch, weightlab as wl
from weightlab.stream.executor import Resources

def halfway(done, total):
    if 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)

base = {"w": torch.zeros(4_000_000)}
wl.diff(base, {"w": torch.ones(4_000_000)}, sys.argv[1], encode="dense", resources=Resources(progress=halfway))
"""


@pytest.mark.parametrize("place", ["p.safetensors", "folder"])
def test_a_killed_run_leaves_nothing_that_looks_like_a_patch(tmp_path: Path, place: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / place)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".") and left[0].endswith(".partial")
    assert not list(tmp_path.rglob("*.json")) and not (tmp_path / place).exists()
    wl.diff({"w": torch.zeros(9)}, {"w": torch.ones(9)}, tmp_path / place).verify()
    assert [p.name for p in tmp_path.iterdir()] == [place]  # what was left is gone


PEAK = """
import sys, weightlab as wl
from pathlib import Path
from weightlab.stream.executor import Resources

folder, *encodings = sys.argv[1:]
for encode in encodings:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    wl.diff(folder + "/base.safetensors", folder + "/tuned.safetensors", encode=encode, resources=Resources(threads=2))
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def peak(folder: Path, shape: tuple[int, int], count: int, encodings: list[str]) -> dict[str, int]:
    """The largest memory, in kB, that a process takes for a difference of so many bf16 tensors, by encoding."""
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(shape, generator=generator).bfloat16() for i in range(count)}
    save_file(base, folder / "base.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in base.items()}, folder / "tuned.safetensors")
    command = [sys.executable, "-c", PEAK, str(folder), *encodings]
    done = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TMPDIR": str(folder)})
    return dict(zip(encodings, map(int, done.stdout.split()), strict=True))


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    encodings = ["dense", "exact", "quantized:4:channel", "sparse:0.1", "sign"]
    small, large = (peak(tmp_path, (rows, 2048), 1, encodings) for rows in (2_000, 16_000))  # 8 and 64 MB
    # The allocator's mood is worth some 30 MB, and a tensor that were held once, in 16 bits, 56 MB.
    assert all(large[encode] < small[encode] + 45_000 for encode in encodings), (small, large)


def test_memory_does_not_grow_with_the_number_of_matrices(tmp_path: Path) -> None:
    few, many = (peak(tmp_path, (1536, 1536), count, ["low_rank:32"])["low_rank:32"] for count in (3, 15))
    assert many < few + 45_000, (few, many)  # in fp32, the 12 more take 113 MB
