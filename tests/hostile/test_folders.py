"""Nothing but the model and the output is touched, whatever lies in a stranger's folder, by any command."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from zlib import crc32

import pytest
from weightlab_cli.main import COMMANDS as KNOWN
from weightlab_cli.main import run

from tests.hostile.commands import COMMANDS, commands
from tests.hostile.folders import HOSTILE, KINDS, Spoiled, build
from tests.hostile.snapshot import changes, snapshot

SECONDS = 60
"""A command that waits for a pipe would wait for ever."""
ALL = bool(os.environ.get("WEIGHTLAB_TORTURE"))
"""Whether all are tried; otherwise a seventh, which is the same each time."""
LEFT_OUT = ("demo", "eval")  # which take no folder of the kinds here, or load them as `twin export` does


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scene")
    build(place)
    return place


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def play(scene: Path, place: Path, hostile: Spoiled | None, kind: str) -> list[tuple[str, int]]:
    """Every command on a fresh scene, spoiled; (command, exit code) of each."""
    codes = []
    root = shutil.copytree(scene, place / "root", symlinks=True)
    os.chdir(root)
    it = root / "stranger" / kind
    if hostile is not None:
        hostile.spoil(it, root / "victim")
    (root / "out").mkdir()
    before = snapshot(root, [it, root / "out"])
    for words in commands(kind):
        signal.alarm(SECONDS)
        code = run([*words, "--quiet"])
        signal.alarm(0)
        codes.append((" ".join(words), code))
        assert code != 1, words  # a bug of ours
        found = changes(before, snapshot(root, [it, root / "out"]))
        assert not found, (words, found)
        shutil.rmtree(root / "out")
        (root / "out").mkdir()
    return codes


@pytest.mark.parametrize("kind", KINDS)
def test_good_folders_are_taken(scene: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every command could fail for a reason of its own, and nothing would be tested."""
    monkeypatch.chdir(tmp_path)
    codes = play(scene, tmp_path, None, kind)
    assert sum(code == 0 for _, code in codes) >= {"adapter": 5, "twin": 1}.get(kind, len(codes) // 2), codes


def chosen() -> list[Spoiled]:
    return [h for h in HOSTILE if ALL or crc32(f"{h.kind} {h.label}".encode()) % 7 == 0]


@pytest.mark.parametrize("hostile", chosen(), ids=lambda h: f"{h.kind}: {h.label}")
def test_hostile_folders(scene: Path, tmp_path: Path, hostile: Spoiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    play(scene, tmp_path, hostile, hostile.kind)


def test_every_command_is_tried() -> None:
    tried = {words[0] for lines in COMMANDS.values() for words in lines}
    assert tried | set(LEFT_OUT) == set(KNOWN.names())
