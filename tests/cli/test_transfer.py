"""`weightlab transfer`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.cli.conftest import Weightlab
from tests.patches.tools import state


def test_a_fine_tune_is_moved(weightlab: Weightlab, place: Path) -> None:
    save_file(state(5, 0.02), place / "next.safetensors")
    found = weightlab("transfer", "base", "tuned", "next.safetensors", "-o", "moved.safetensors", "--json")
    assert found.code == 0 and found.json["out"] == "moved.safetensors" and found.json["rows"] is None
    moved, base, tuned = load_file(place / "moved.safetensors"), state(), state(1, 0.01)
    assert moved.keys() == base.keys()
    before = (place / "moved.safetensors").read_bytes()
    assert weightlab("transfer", "base", "tuned", "next.safetensors", "-o", "moved.safetensors").code != 0
    assert (place / "moved.safetensors").read_bytes() == before
    dry = weightlab("transfer", "base", "tuned", "next.safetensors", "-o", "dry", "--scale", "2", "--dry-run")
    assert dry.code == 0 and not (place / "dry").exists() and tuned
    assert weightlab("transfer", "base", "nowhere", "next.safetensors", "-o", "x").code == 3
