"""Signatures whose running statistics are measured on images, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightlab_cli.main import run
from weightlab_evals.images.statistics import measured
from weightlab_evals.networks import vgg_bn

import weightlab as wl
from tests.evals.images.machine import with_corruptions
from weightlab.extract.norms import norm_tensors

pytestmark = with_corruptions
NETWORK = "weightlab_evals.networks:vgg_bn"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `start`, `clean` and `noisy`.safetensors of one network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    state = vgg_bn().state_dict()
    for name, size in (("start", 0.0), ("clean", 0.01), ("noisy", 0.01)):
        moved = {n: t + size * torch.rand(t.shape) if t.is_floating_point() else t for n, t in state.items()}
        save_file(moved, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_they_are_those_of_the_patched_network(place: Path) -> None:
    words = ["signature", "start.safetensors", "clean.safetensors", "noisy.safetensors", "-o", "p.safetensors"]
    words += ["--model", NETWORK, "--norm", "recalibrate", "--encode", "dense:fp32"]
    assert (
        run(words) == 2 and run([*words, "--data", "digits", "--limit", "100", "--corruption", "gaussian_noise"]) == 0
    )
    clean = load_file("clean.safetensors")
    result = wl.apply(clean, "p.safetensors")
    affine, statistics = norm_tensors(clean)
    noisy = load_file("noisy.safetensors")
    assert all(torch.allclose(result[n], noisy[n], atol=1e-6) for n in affine)
    again = measured("clean.safetensors", wl.open_patch("p.safetensors"), "digits", "gaussian_noise", NETWORK, 100)
    assert set(again) == set(statistics)  # the statistics do not depend on what they were before
    assert all(torch.allclose(result[n], again[n], atol=1e-5) for n in statistics)
    other = measured("clean.safetensors", wl.open_patch("p.safetensors"), "digits", None, NETWORK, 100)
    assert not all(torch.allclose(result[n], other[n], atol=1e-3) for n in statistics)


def test_data_without_recalibrating(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["signature", "start.safetensors", "clean.safetensors", "noisy.safetensors", "-o", "p.safetensors"]
    assert run([*words, "--data", "digits"]) == 2
    assert "go together" in capsys.readouterr().err and not Path("p.safetensors").exists()
