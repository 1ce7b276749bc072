"""The script that changes the library: it finds what can be changed, and tells whether a test notices."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent / "mutants.py"
SMALL = 'def least(a: int, b: int) -> int:\n    """The smaller, at least 0."""\n    return max(0, a if a < b else b)\n'
TESTS = (
    "from weightlab.room.small import least\n\n"
    "def test_least():\n    assert least(1, 2) == 1 and least(3, 2) == 2\n\n"
    "def test_that_fails_anyway():\n    assert least(1, 2) == 3\n"
)


@pytest.fixture
def mutants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a project in `tmp_path`."""
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def changes(mutants: ModuleType, tmp_path: Path, text: str, name: str = "small") -> set[str]:
    """All that can be made of a statement or more, without the first lines that stay as they are."""
    file = tmp_path / "weightlab" / "room" / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return {mutant.source() for mutant in mutants.mutants_in(file)}


def test_what_can_be_changed(mutants: ModuleType, tmp_path: Path) -> None:
    found = {ast.unparse(ast.parse(text).body[0].body[1]) for text in changes(mutants, tmp_path, SMALL)}  # type: ignore[attr-defined]
    assert found == {
        "return max(0, a if not a < b else b)",
        "return max(1, a if a < b else b)",
        "return max(0, a if a <= b else b)",
    }


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("x = a + 1", {"x = a - 1", "x = a + 2"}),
        ("x = 'a' + b", set()),
        ("x = a and b", {"x = a or b"}),
        ("x = a < b < c", {"x = a <= b < c", "x = a < b <= c"}),
        ("x = f(True)", {"x = f(False)"}),
        ("MOST = 64 << 20", set()),
        ("MOST: int = 1000", set()),
        ("MOST = 999", {"MOST = 1000"}),
        ("most = 1000", {"most = 1001"}),
        ("f(2**24, n)", set()),
        ("f(n**24)", {"f(n * 24)", "f(n ** 25)"}),
        ("zip(a, b, strict=True)", set()),
        ("assert x == 1", set()),
        ("raise E(f'{x + 1}', 2)", set()),
        ("x: Literal[1] = y", set()),
    ],
)
def test_one_statement(mutants: ModuleType, tmp_path: Path, text: str, made: set[str]) -> None:
    assert changes(mutants, tmp_path, text) == made


def test_numbers_of_drawings(mutants: ModuleType, tmp_path: Path) -> None:
    assert changes(mutants, tmp_path, "x = a + 1", "plot_it") == {"x = a - 1"}


def test_the_function_that_a_change_is_in(mutants: ModuleType, tmp_path: Path) -> None:
    changes(
        mutants,
        tmp_path,
        "A = 1\n\nclass C:\n    B = 1\n\n    @d\n    def f(self):\n        def g():\n            return 1\n",
    )
    file = tmp_path / "weightlab" / "room" / "small.py"
    assert [mutant.lines for mutant in mutants.mutants_in(file)] == [(0, 0), (0, 0), (6, 9)]


def test_whose_tests_judge_a_file(mutants: ModuleType, tmp_path: Path) -> None:
    for name in ("tests/room/test_a.py", "tests/test_b.py", "tests/test_a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert mutants.folder_of(tmp_path / "weightlab" / "room" / "inner" / "x.py") == ["tests/room"]
    (tmp_path / "tests" / "doors").mkdir()
    assert mutants.folder_of(tmp_path / "weightlab" / "room" / "_door_frames.py") == ["tests/room", "tests/doors"]
    assert mutants.folder_of(tmp_path / "weightlab" / "doors" / "door.py") == ["tests/doors"]
    assert mutants.folder_of(tmp_path / "weightlab" / "room" / "doorway.py") == ["tests/room"]
    top = ["tests/test_a.py", "tests/test_b.py"]
    assert mutants.folder_of(tmp_path / "weightlab" / "x.py") == top
    assert mutants.folder_of(tmp_path / "weightlab" / "hall" / "x.py") == top


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_change_is_noticed_or_not(tmp_path: Path, workers: str) -> None:
    """Neither 0 nor equal numbers are tried by the test of that project; one that fails unchanged notices nothing."""
    for name, text in (
        ("weightlab/room/__init__.py", ""),
        ("weightlab/__init__.py", ""),
        ("weightlab/room/small.py", SMALL),
        ("tests/room/test_small.py", TESTS),
        (".gitignore", "__pycache__\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copyfile(SCRIPT, tmp_path / "tests" / "mutants.py")
    subprocess.run("git init -q && git add .", shell=True, cwd=tmp_path, check=True)
    code = "import mutants, sys\nmutants.HEAVY = ()\nsys.exit(mutants.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--workers", workers],
        cwd=tmp_path / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr
    assert lines[0] == "3 of 3 changes in 3 files, seed 0" and lines[-1] == "1 of 3 noticed"
    assert [line for line in lines if "FAILS UNCHANGED" in line and "test_that_fails_anyway" in line]
    states = {
        line.split("  ", 2)[-1].rpartition(":")[2]: "noticed" in line
        for line in lines
        if "weightlab/room/small.py" in line
    }
    assert sorted(states.values()) == [False, False, True]
    assert (tmp_path / "weightlab" / "room" / "small.py").read_text() == SMALL
