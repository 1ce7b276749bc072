"""The loss between two fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weightlab_cli.main import run
from weightlab_evals.lm.barrier import barrier

from weightlab.errors import UsageError

pytest.importorskip("transformers", reason="transformers is in the extra lm")

from tests.evals.lm.machine import WORDS, model, tuned


def bump(module: nn.Module) -> float:
    """A loss of one number w: 0 at 0, 4 at 2, with a hill of 1 at 1; by its formula w² + (1 − (w − 1)²)."""
    w = float(next(module.parameters()).detach())
    return w * w + (1 - (w - 1) ** 2)


def test_by_hand(tmp_path: Path) -> None:
    for name, value in (("base", 3.0), ("tuned", 0.0), ("target", 2.0)):
        save_file({"weight": torch.tensor([[value]]), "bias": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.zero_(), module.bias.zero_()
    base, start, end = (str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned", "target"))
    found = barrier(base, start, end, bump, module, points=5)
    assert found.scales == [0, 0.25, 0.5, 0.75, 1] and found.losses == [0, 1, 2, 3, 4]  # it is 2·w
    assert found.barrier == 0 and found.base_loss == 6 and found.relative == 0
    hill = barrier(base, start, end, lambda m: 1 - (float(m.weight.detach()) - 1) ** 2, module, points=3)
    assert hill.losses == [0, 1, 0] and hill.barrier == 1 and hill.relative is None
    assert float(module.weight.detach()) == 0
    with pytest.raises(UsageError, match="points"):
        barrier(base, start, end, bump, module, points=2)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model(tmp_path / "base", dtype=torch.float32)
    folders = [base]
    for seed, name in enumerate(("tuned", "next", "next-tuned")):
        folder = model(tmp_path / name, dtype=torch.float32)
        (folder / "model.safetensors").unlink()
        tuned(base, tmp_path / f"{name}-weights", seed, 0.01)
        (tmp_path / f"{name}-weights" / "model.safetensors").rename(folder / "model.safetensors")
        folders.append(folder)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[3:] * 4))
    words = ["connectivity", *map(str, folders[:3]), "--target-tuned", str(folders[3])]
    words += ["--text", str(tmp_path / "text.txt"), "--plot", str(tmp_path / "line.png"), "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forecast"] == "near" and len(found["barrier"]["losses"]) == 11
    assert (tmp_path / "line.png").stat().st_size > 5000
    assert run([*words[:4], "--text", "x"]) == 2
