"""The script that changes the library: it finds what can be changed, and tells whether a test notices."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent / "mutants.py"


@pytest.fixture
def mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a project of one function with a test that knows half of it."""
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "weightlab" / "room").mkdir(parents=True)
    (tmp_path / "tests" / "room").mkdir(parents=True)
    (tmp_path / "weightlab" / "room" / "small.py").write_text(
        'def least(a: int, b: int) -> int:\n    """The smaller, at least 0."""\n    return max(0, a if a < b else b)\n'
    )
    (tmp_path / "tests" / "room" / "test_small.py").write_text(
        "from weightlab.room.small import least\n\n"
        "def test_least():\n    assert least(1, 2) == 1 and least(3, 2) == 2\n"
    )
    return module


def test_what_can_be_changed(mutants: ModuleType, tmp_path: Path) -> None:
    found = list(mutants.mutants_in(tmp_path / "weightlab" / "room" / "small.py"))
    sources = {ast.unparse(ast.parse(mutant.source()).body[0].body[1]) for mutant in found}  # type: ignore[attr-defined]
    assert sources == {
        "return max(0, a if not a < b else b)",
        "return max(1, a if a < b else b)",
        "return max(0, a if a <= b else b)",
    }


def test_a_change_is_noticed_or_not(mutants: ModuleType, tmp_path: Path) -> None:
    before = (tmp_path / "weightlab" / "room" / "small.py").read_text()
    place = tmp_path / "copy"
    (place / "weightlab" / "room").mkdir(parents=True)
    (place / "tests" / "room").mkdir(parents=True)
    for name in ("weightlab/room/small.py", "tests/room/test_small.py"):
        (place / name).write_text((tmp_path / name).read_text())
    file = tmp_path / "weightlab" / "room" / "small.py"
    found = {mutant.what: mutants.noticed(mutant, place) for mutant in mutants.mutants_in(file)}
    assert sorted(found.values()) == [False, False, True]  # neither 0 nor equal numbers are tried by that test
    assert (place / "weightlab" / "room" / "small.py").read_text() == before
