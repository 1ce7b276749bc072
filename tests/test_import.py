"""`import weightlab` and `weightlab --help` stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("transformers", "peft", "lm_eval", "datasets", "matplotlib", "torch", "numpy", "rich")


def loaded(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of the modules a fresh interpreter has after running `code`."""
    report = f"import sys; {code}; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    found: list[str] = ast_list(done.stdout.splitlines()[-1])
    return found


def ast_list(text: str) -> list[str]:
    import ast

    value: list[str] = ast.literal_eval(text)
    return value


@pytest.mark.parametrize(
    "code", ["import weightlab", "import weightlab_cli.main as m; m.COMMANDS.names(); m.run(['--help'])"]
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded(code) == []


def test_the_library_never_imports_model_libraries() -> None:
    """Not even when everything is used."""
    code = "import weightlab as wl; [getattr(wl, n) for n in wl.__all__]"
    assert loaded(code, ("transformers", "peft", "lm_eval", "datasets", "matplotlib")) == []


def test_this_test_can_fail() -> None:
    assert loaded("import weightlab as wl; wl.diff") == ["torch", "numpy"]
