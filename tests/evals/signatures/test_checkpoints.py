"""Checkpoints are trained once and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weightlab_evals.signatures import checkpoints
from weightlab_evals.signatures.checkpoints import AUGMENTED, FURTHER, Checkpoints, Domain
from weightlab_evals.signatures.data import Part
from weightlab_evals.signatures.training import Recipe


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Recipe]]:
    """What was trained: (images, recipe) each; training itself only adds one to every weight."""
    calls: list[tuple[int, Recipe]] = []

    def train(module: torch.nn.Module, shown: Part, recipe: Recipe, seed: int) -> None:
        calls.append((len(shown), recipe))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)

    monkeypatch.setattr(checkpoints, "train", train)
    return calls


def test_each_is_trained_once(trained: list[tuple[int, Recipe]], tmp_path: Path) -> None:
    have = Checkpoints("vgg", 0, tmp_path)
    tuned = have.tuned("A")
    assert [count for count, _ in trained] == [1500, 1750]
    assert all(torch.equal(t, have.start()[n] + 1) for n, t in tuned.items())
    further = have.tuned("A", AUGMENTED, FURTHER)
    assert [(count, r.augment) for count, r in trained[2:]] == [(1500, True), (1750, True)]
    assert all(torch.equal(t, have.start()[n] + 2) for n, t in further.items())
    assert 0 < len(have.shown("A 0-4", "train")) < 1750
    again = Checkpoints("vgg", 0, tmp_path)
    assert all(torch.equal(t, tuned[n]) for n, t in again.tuned("A").items()) and len(trained) == 4
    other = Checkpoints("vgg", 1, tmp_path)
    assert any(not torch.equal(t, have.start()[n]) for n, t in other.start().items())


def test_another_recipe_is_another_folder(
    trained: list[tuple[int, Recipe]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Checkpoints("vit", 0, tmp_path)
    first.tuned("B")
    monkeypatch.setitem(checkpoints.DOMAINS, "B", Domain("digits", range(10), Recipe(1, 0.5)))
    second = Checkpoints("vit", 0, tmp_path)
    second.tuned("B")
    assert first.recipe_id != second.recipe_id and trained[-1] == (1000, Recipe(1, 0.5))
