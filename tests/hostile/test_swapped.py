"""As `test_folders`, with links that another process puts into the stranger's folder while a command is at work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from weightlab_cli.main import run

from tests.hostile import swapper
from tests.hostile.commands import commands
from tests.hostile.snapshot import changes, snapshot
from tests.hostile.test_folders import ALL, SECONDS, no_waiting, scene  # noqa: F401

ROUNDS = 10 if ALL else 1


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("kind", ["model", "sharded", "stack", "patches", "adapter", "twin"])
def test_links_that_come_and_go(
    scene: Path,  # noqa: F811
    tmp_path: Path,
    kind: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = shutil.copytree(scene, tmp_path / "root", symlinks=True)
    monkeypatch.chdir(root)
    (root / "out").mkdir()
    without = [root / "stranger", root / "out"]
    before = snapshot(root, without)
    words = [sys.executable, swapper.__file__, str(seed), str(root), kind]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as other:
        for words in commands(kind):
            assert run([*words, "--quiet"]) != 1, words  # a bug of ours
            assert other.poll() is None
            found = changes(before, snapshot(root, without))
            assert not found, (words, found)
            shutil.rmtree(root / "out")
            (root / "out").mkdir()
        assert other.stdin is not None
        other.stdin.close()
    assert other.returncode == 0
