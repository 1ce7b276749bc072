"""Running command lines in this process, and small models to run them on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from weightlab_cli.main import run

from tests.patches.tools import state


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object that a command prints with --json, checked to be the only thing it prints."""
        assert self.err == "" and self.out.count("\n") == 1 and self.out.endswith("\n")
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    @property
    def error(self) -> Any:
        """The error in it."""
        assert set(self.json) == {"error"} and self.json["error"]["exit_code"] == self.code
        return self.json["error"]


Weightlab = Callable[..., Ended]


@pytest.fixture
def weightlab(capsys: pytest.CaptureFixture[str]) -> Weightlab:
    """Runs `weightlab WORDS...` in this process; a traceback is never right."""

    def weightlab(*words: object) -> Ended:
        capsys.readouterr()
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err or "--debug" in words
        return Ended(code, out, err)

    return weightlab


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `base` and `tuned` are folders with one file of weights, `other.safetensors` is a third."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        save_file(state(seed, 0.01 * seed), tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    save_file(state(2, 0.1), tmp_path / "other.safetensors")
    return tmp_path


@pytest.fixture
def patches(place: Path, weightlab: Weightlab) -> Path:
    """The same, with `exact.safetensors` and `dense.safetensors`, both from `base`, to `tuned` and to the other."""
    assert weightlab("diff", "base", "tuned", "-o", "exact.safetensors").code == 0
    assert weightlab("diff", "base", "other.safetensors", "-o", "dense.safetensors", "--encode", "dense").code == 0
    return place
