"""What is built and installed: our three packages whole, nothing else, with every dependency declared and pinned."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.message import Message
from email.parser import BytesParser
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HOMES = {"weightlab": ".", "weightlab_cli": "cli", "weightlab_evals": "evals"}


class Built(NamedTuple):
    tree: Path
    sdist: Path
    wheel: Path


# Used where the user has it, and no extra asks for it: its torchvision is made for one torch each.
BROUGHT = {"timm"}
# A subclass of an extra's class; only imported where that extra is asked for.
ON_REQUEST = {"weightlab_evals/lm/model.py", "weightlab_evals/lm/twin.py", "weightlab_evals/transfer/gaps.py"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel made from it, of a copy in which nothing of an earlier build lies."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    leave = (".git", ".venv", ".*cache", ".hypothesis", ".weightlab", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*leave))
    command = [sys.executable, "-m", "build", "--no-isolation", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return Built(tree, sdist, wheel)


def sources(tree: Path) -> dict[str, Path]:
    """{the name when installed: file} of every module."""
    return {
        path.relative_to(tree / home).as_posix(): path
        for package, home in HOMES.items()
        for path in (tree / home / package).rglob("*.py")
    }


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return BytesParser().parsebytes(archive.read(name))


def requirements(wheel: Path) -> tuple[set[str], set[str]]:
    """Distributions that are always needed, and those that extras need."""
    found = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    core: set[str] = {canonicalize_name(r.name) for r in found if "extra" not in str(r.marker)}
    everything: set[str] = {canonicalize_name(r.name) for r in found}
    return core, everything - core


def test_the_wheel_holds_every_module_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == sources(built.tree).keys() | {
        "weightlab/py.typed"
    }  # a folder without __init__.py would be missing


def test_the_sdist_can_be_tested(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(built.tree).as_posix() for path in (built.tree / "tests").rglob("*.py")}
    assert inside >= tests | {"LICENSE", "Makefile", "constraints.txt", ".ci/run", "evals/benchmarks/engine.py"} | {
        path.relative_to(built.tree).as_posix() for path in (built.tree / "manifests").rglob("*.yaml")
    }


def test_the_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (scripts,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert archive.read(scripts).decode().split() == [
            "[console_scripts]",
            "weightlab",
            "=",
            "weightlab_cli.main:cli",
        ]
    found = metadata(built.wheel)
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"


def test_every_import_is_declared(built: Built) -> None:
    """What a module imports at once is needed by everyone; what it imports in a function may be an extra."""
    core, extra = requirements(built.wheel)
    for at_once, allowed in ((True, core), (False, core | extra)):
        for name, path in sources(built.tree).items():
            if at_once and name in ON_REQUEST:
                continue
            imported = set(third_party(path, at_once)) - (set() if at_once else BROUGHT)
            undeclared = {module for module in imported if not distributions(module) & allowed}
            assert not undeclared, f"{name} imports {undeclared}"


def test_every_requirement_is_pinned_once_for_each_python(built: Built) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert pins[0].name == "torch"
    core, extra = requirements(built.wheel)
    for version in ("3.10", "3.11", "3.14"):
        chosen = [p for p in pins if p.marker is None or p.marker.evaluate({"python_version": version})]
        names = [canonicalize_name(p.name) for p in chosen]
        assert len(names) == len(set(names)), version
        assert core | extra <= set(names), version
    assert all(len(p.specifier) == 1 and str(p.specifier).startswith("==") for p in pins)


def third_party(path: Path, at_once: bool) -> Iterator[str]:
    """The packages that a file imports and that are neither Python's nor ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in HOMES:
                yield top


@functools.cache
def installed() -> Mapping[str, Sequence[str]]:
    return packages_distributions()


def distributions(module: str) -> set[str]:
    """The distributions that bring a package; its own name where none that is installed does."""
    return {canonicalize_name(name) for name in installed().get(module, [module])}
