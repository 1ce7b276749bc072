"""`weightlab eval images`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.evals.images.machine import with_corruptions
from tests.evals.images.test_data import class_folders
from tests.evals.images.test_evaluate import CNN, moved, saved_cnn

pytestmark = with_corruptions


@pytest.fixture
def cnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `m.safetensors`, `p.safetensors` and `x.npz`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path / "cache"))
    moved(saved_cnn(tmp_path / "m.safetensors"), 0.3)
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez("x.npz", images=images, labels=np.arange(10))
    return tmp_path


MODEL = ("eval", "images", "m.safetensors", "--model", CNN)


def test_a_sweep_of_scales(weightlab: Weightlab, cnn: Path) -> None:
    before = (cnn / "m.safetensors").read_bytes()
    words = (
        "--data",
        "x.npz",
        "--patch",
        "p.safetensors@0.5",
        "--scales",
        "0,1",
        "--corruption",
        "fog",
        "--severity",
        "3",
    )
    shown = weightlab(*MODEL, *words, "-o", "r.json", "--plot", "p.png")
    assert shown.code == 0 and "fog 3" in shown.out and "mean corruption error" in shown.out and "scale 1" in shown.out
    found = weightlab(*MODEL, *words, "--json").json
    assert found == json.loads(Path("r.json").read_text()) and Path("p.png").exists()
    assert [row["patches"][0]["scale"] for row in found["rows"][1:]] == [0.0, 0.5]
    assert (cnn / "m.safetensors").read_bytes() == before and not (cnn / ".weightlab").exists()


def test_errors(weightlab: Weightlab, cnn: Path) -> None:
    class_folders(cnn / "photos", {"ant": 1, "bee": 0})
    wl.diff(
        {"w": load_file("m.safetensors")["classifier.bias"]},
        {"w": load_file("m.safetensors")["classifier.bias"] + 1},
        "q.safetensors",
    )
    np.savez("y.npz", images=np.zeros((2, 32, 32), np.uint8), labels=np.asarray([3, 10]))
    for words, code, says in (
        (("--data", "photos"), 3, "bee: no image in it"),
        (("--data", "nowhere"), 3, "no such folder"),
        (("--data", "y.npz"), 3, "tells 10 apart"),
        (("--data", "x.npz", "--corruption", "fogg"), 2, "fogg"),
        (("--data", "x.npz", "--scales", "a"), 2, "are no numbers"),
        (("--data", "x.npz", "--device", "nowhere"), 2, "--device nowhere cannot be used"),
        (("--data", "x.npz", "--patch", "p.safetensors", "--memory", "1M"), 2, "too small"),
        (("--data", "x.npz", "--patch", "q.safetensors", "--corruption", "none"), 4, "w"),
        (("--data", "x.npz", "--patch", "nowhere.safetensors"), 3, "nowhere"),
        (("--data", "x.npz", "-o", "x.npz"), 4, "exists already"),
        (("--data", "x.npz", "--plot", "p.jpg"), 2, ".png"),
    ):
        ended = weightlab(*MODEL, *words)
        assert ended.code == code and says in ended.err and ended.out == "", words
    assert weightlab("eval", "image", "m.safetensors").code == 2
    assert weightlab("eval", "images", "m.safetensors", "--data", "x.npz").code == 3


def test_clean_only_and_dry(weightlab: Weightlab, cnn: Path) -> None:
    clean = weightlab(*MODEL, "--data", "x.npz", "--corruption", "none", "--limit", "4", "--json").json
    assert [c["corruption"] for c in clean["rows"][0]["cells"]] == ["clean"] and clean["images"] == 4
    dry = weightlab(*MODEL, "--data", "x.npz", "--patch", "p.safetensors", "--dry-run", "--json").json
    assert dry["dry_run"] and dry["images"] == 10 and len(dry["patches"]) == 1
    assert not (cnn / "cache").exists()
