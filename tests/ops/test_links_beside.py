"""Links among the files beside a model: what they lead to is passed on only where it is the model's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightlab_cli.main import run

import weightlab as wl
from weightlab.files import links
from weightlab.ops import new_checkpoint
from weightlab.ops.companions import copy_companions
from weightlab.twin.split import twin_split

DIGEST = "0123456789abcdef" * 4


def model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.full((4, 4), value), "b": torch.full((4,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def change(tmp_path: Path) -> Path:
    a, b = {"w": torch.ones(4, 4)}, {"w": torch.full((4, 4), 3.0)}
    wl.diff(a, b).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "sub/tokenizer.json", "config.json"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_link_to_a_file_of_the_user_is_refused(
    tmp_path: Path, change: Path, name: str, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "sesame"}')
    base = model(tmp_path / "base")
    (base / "sub").mkdir()
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    (base / "README.md").symlink_to(os.path.relpath(secret, base))
    with pytest.raises(wl.WeightlabError, match="lead out of the folder") as failed:
        wl.apply(base, change, out=tmp_path / "out", dry_run=dry_run)
    assert failed.value.exit_code == 3
    assert set(failed.value.offenders) == {f"{n}: leads to {secret.resolve()}" for n in (name, "README.md")}
    assert not (tmp_path / "out").exists()
    for words in (
        ["transfer", str(model(tmp_path / "a")), str(model(tmp_path / "b", 2.0)), str(base)],
        ["twin", "split", str(base), f"x={tmp_path / 'a'}", f"y={tmp_path / 'b'}"],
    ):
        assert run([*words, "-o", str(tmp_path / "out")]) == 3
        assert "lead out of the folder" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_links_within_the_folder_are_followed(tmp_path: Path, change: Path) -> None:
    base = model(tmp_path / "base")
    (base / "sub").mkdir()
    (base / "sub" / "real.txt").write_text("licence")
    (base / "LICENSE").symlink_to("sub/real.txt")
    (tmp_path / "linked").symlink_to(base)
    wl.apply(tmp_path / "linked", change, out=tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "licence" and not (tmp_path / "out" / "LICENSE").is_symlink()


@pytest.mark.parametrize("moved", [True, False])
def test_a_snapshot_of_the_hubs_cache_is_a_model(tmp_path: Path, change: Path, moved: bool) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    whole = model(tmp_path / "whole")
    (whole / "sub").mkdir()
    (whole / "sub" / "tokenizer.json").write_text('{"a": 1}')
    for number, name in enumerate(("model.safetensors", "config.json", "sub/tokenizer.json")):
        blob = repository / "blobs" / (f"{number}{DIGEST[1:]}" if number else DIGEST[:40])
        shutil.copy(whole / name, blob)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if moved:  # a cache under a link, and a folder that was filled from it with links
        (tmp_path / "hub").rename(tmp_path / "disk")
        (tmp_path / "hub").symlink_to(tmp_path / "disk")
        local = tmp_path / "local"
        local.mkdir()
        for name in ("model.safetensors", "config.json", "sub/tokenizer.json"):
            (local / name).parent.mkdir(exist_ok=True)
            (local / name).symlink_to(tmp_path / "hub" / os.path.relpath(snapshot / name, tmp_path / "hub"))
        snapshot = local
    wl.apply(snapshot, change, out=tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "tokenizer.json").read_text() == '{"a": 1}'
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].eq(3).all()
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("place", ["models--x/blobs/../../secret", "models--x/blobs/secret", "blobs/" + DIGEST])
def test_what_only_looks_like_the_hubs_cache(tmp_path: Path, change: Path, place: str) -> None:
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / place).write_text("secret")
    base = model(tmp_path / "base")
    (base / "x.txt").symlink_to(tmp_path / place)
    with pytest.raises(wl.WeightlabError, match="lead out of the folder"):
        wl.apply(base, change, out=tmp_path / "out")


def test_a_link_that_comes_after_the_check_is_noticed(
    tmp_path: Path, change: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("sesame")
    base = model(tmp_path / "base")
    (base / "LICENSE").write_text("licence")
    copy = copy_companions

    def swapped(folder: Path, names: list[Path], out: Path) -> int:
        (base / "LICENSE").unlink()
        (base / "LICENSE").symlink_to(tmp_path / "secret")
        return copy(folder, names, out)

    monkeypatch.setattr(new_checkpoint, "copy_companions", swapped)
    with pytest.raises(wl.WeightlabError, match="lead out of the folder"):
        wl.apply(base, change, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "p.safetensors", "secret"]


def test_what_no_file_is_and_linked_folders_are_listed(
    tmp_path: Path, change: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("x")
    (base / "assets").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(base / "pipe")
    assert run(["apply", str(base), str(change), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "left out: assets/ (a link to a folder, which is not followed)" in told
    assert "left out: pipe (no plain file)" in told
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tune_and_an_expert_pass_nothing_on(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"password": "sesame"}')
    base, tuned, target = (model(tmp_path / name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 1.5)))
    (tuned / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(wl.WeightlabError, match="lead out of the folder"):
        wl.transfer(base, tuned, target, tmp_path / "out")
    (target / "config.json").unlink()
    (target / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(wl.WeightlabError, match="lead out of the folder"):
        twin_split(base, {"b": tuned, "c": target}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(wl.WeightlabError, match="no plain file"):
        links.open_inside(tmp_path, "pipe")
