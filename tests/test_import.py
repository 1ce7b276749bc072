"""`import weightlab` and `weightlab --help` stay light, and model libraries are never imported on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL_LIBRARIES = ("transformers", "peft", "lm_eval", "datasets", "accelerate", "matplotlib")
HEAVY = (*MODEL_LIBRARIES, "torch", "numpy", "safetensors", "huggingface_hub", "pydantic", "rich")
EVERYTHING = "import weightlab as wl; [getattr(wl, name) for name in wl.__all__]"


def loaded(code: str, names: tuple[str, ...], path: Path | None = None) -> list[str]:
    """Which of the modules a fresh interpreter has after running `code`; `path` comes first in its search path."""
    report = f"{code}\nimport json, sys; print(json.dumps([n for n in {names!r} if n in sys.modules]))"
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, env=environment)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("code", ["import weightlab", "from weightlab_cli.main import run; run(['--help'])"])
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded(code, HEAVY) == []


def test_model_libraries_are_not_imported_by_any_name_of_the_library() -> None:
    assert loaded(EVERYTHING, MODEL_LIBRARIES) == []


def test_these_tests_can_fail(tmp_path: Path) -> None:
    """With a transformers to import and a dependency that imports it, they would notice."""
    (tmp_path / "transformers.py").write_text("")
    (tmp_path / "blake3.py").write_text("import transformers\n\nclass blake3: ...\n")
    assert set(loaded(EVERYTHING, HEAVY, tmp_path)) >= {"transformers", "torch"}
