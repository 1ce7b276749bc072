"""The architecture as it is written down in CONTRIBUTING: imports point down, and some doors are the only ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = (ROOT, ROOT / "cli", ROOT / "evals")  # the folders whose packages are installed

# A unit imports itself or what has a lower number; two with the same number do not know each other.
LAYERS = {
    "weightlab.errors": 0,
    "weightlab.version": 0,
    "weightlab.registry": 1,
    "weightlab.tensors": 1,
    "weightlab.files": 2,
    "weightlab.networks": 3,
    "weightlab.sources": 4,
    "weightlab.encodings": 4,
    "weightlab.adapters": 5,
    "weightlab.stream": 5,
    "weightlab.methods": 6,
    "weightlab.patches": 6,
    "weightlab.stack": 7,
    "weightlab.extract": 8,
    "weightlab.ops": 9,
    "weightlab.runtime": 10,
    "weightlab.twin": 11,
    "weightlab": 12,  # `import weightlab`: what users see
    "weightlab_evals": 13,
    "weightlab_cli": 14,
}

# What changes a file or folder, as functions of `os` and as methods of paths.
CHANGING_CALLS = {
    *("copy_file_range", "fdatasync", "fsync", "ftruncate", "link", "makedirs", "mkdir", "pwrite", "pwritev", "remove"),
    *("removedirs", "rename", "renames", "replace", "rmdir", "sendfile", "symlink", "truncate", "unlink", "write"),
}
CHANGING_METHODS = {
    *("hardlink_to", "mkdir", "rename", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"),
}


def modules(*homes: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the packages in these folders."""
    for home in homes:
        for path in sorted(home.glob("weightlab*/**/*.py")):
            yield ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)


def unit_of(name: str) -> str:
    """The unit that a module or a name in it belongs to; what is no module is a name of the face."""
    package, _, rest = name.partition(".")
    if package == "weightlab" and rest:
        unit = f"weightlab.{rest.split('.')[0]}"
        return unit if unit in LAYERS else package
    return package


def violations(*homes: Path) -> list[str]:
    found = []
    for module, path in modules(*homes):
        unit = unit_of(module)
        if unit == "weightlab" != module:
            found.append(f"{module} has no layer")
            continue
        for name in imports(path):
            if name.startswith("."):
                found.append(f"{module} imports {name}: write the whole name")
            if not name.startswith("weightlab"):
                continue
            if unit_of(name) != unit and LAYERS[unit_of(name)] >= LAYERS[unit]:
                found.append(f"{module} imports {name}")
            owner = re.split(r"\._(?!_)", name)[0]
            if owner != name and not f"{module}.".startswith(f"{owner}."):
                found.append(f"{module} imports {name}, which is private to {owner}")
    return found


def users(library: str, *homes: Path) -> list[str]:
    """The modules that import a library."""
    return [module for module, path in modules(*homes) if any(n.split(".")[0] == library for n in imports(path))]


def changes(path: Path) -> Iterator[str]:
    """The calls in a file that change files: `os.rename`, `.unlink`, `open(…, 'w')`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            yield f"from {node.module} import …"  # would hide them from here
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            home = function.value.id if isinstance(function.value, ast.Name) else ""
            called = function.attr
            if (home == "os" and called in CHANGING_CALLS) or (home == "shutil" and called != "rmtree"):
                yield f"{home}.{called}"
            elif home not in ("os", "disk") and called in CHANGING_METHODS:
                yield f".{called}"
        else:
            called = function.id if isinstance(function, ast.Name) else ""
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if called == "open" and any(re.fullmatch(r"[rwxabt+]*[wxa+][rwxabt+]*", mode) for mode in modes):
            yield f"open({modes[0]!r})"


def test_imports_point_down() -> None:
    assert violations(*HOMES) == []


def test_only_the_container_knows_safetensors() -> None:
    assert users("safetensors", ROOT) == ["weightlab.files.container"]


def test_only_disk_changes_files() -> None:
    """Whatever changes a file is seen by the crash test. (Temporary folders may be removed by anyone.)"""
    found = {module: sorted(set(changes(path))) for module, path in modules(ROOT)}
    assert {m: calls for m, calls in found.items() if calls and m != "weightlab.files.disk"} == {}
    assert found["weightlab.files.disk"]


def test_the_layers_are_those_of_contributing() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    written = {
        "weightlab." + unit.removesuffix(".py"): int(layer)
        for layer, cell in rows
        for unit in re.findall(r"`(\w+(?:\.py)?)/?`", cell)
    }
    assert written == {unit: layer for unit, layer in LAYERS.items() if "." in unit}


def test_what_contributing_points_at_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {word for word in re.findall(r"`([\w./]+/[\w./]*)`", text) if "NAME" not in word and word[0] != "."}
    inside = [path for path in paths if path.count("/") > 1 or not path.endswith("/")]
    assert len(inside) > 10
    assert [path for path in inside if not (ROOT / path).exists()] == []


def _tree(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_layer_test_can_fail(tmp_path: Path) -> None:
    home = _tree(
        tmp_path,
        weightlab__files__a="def f():\n    from weightlab.ops.apply import apply\n",
        weightlab__files__b="from weightlab.files._inner import x\nfrom weightlab.errors import WeightlabError\n",
        weightlab__sources__neighbour="import weightlab.encodings.dense\n",
        weightlab__stack__face="from weightlab import diff\n",
        weightlab__stack__short="from weightlab import extract\n",
        weightlab__stack__helper="from weightlab.encodings._base import Tile\nfrom weightlab.files.disk import _saw\n",
        weightlab__tensors__relative="from .spec import TensorSpec\n",
        weightlab__elsewhere="",
        weightlab_evals__up="import weightlab_cli.main\nimport weightlab as wl\n",
        weightlab_cli__fine="import weightlab as wl\nimport weightlab_evals.demos\nimport os\n",
    )
    assert sorted(violations(home)) == [
        "weightlab.elsewhere has no layer",
        "weightlab.files.a imports weightlab.ops.apply.apply",
        "weightlab.sources.neighbour imports weightlab.encodings.dense",
        "weightlab.stack.face imports weightlab.diff",
        "weightlab.stack.helper imports weightlab.encodings._base.Tile, which is private to weightlab.encodings",
        "weightlab.stack.helper imports weightlab.files.disk._saw, which is private to weightlab.files.disk",
        "weightlab.stack.short imports weightlab.extract",
        "weightlab.tensors.relative imports .spec.TensorSpec: write the whole name",
        "weightlab_evals.up imports weightlab_cli.main",
    ]


def test_the_other_tests_can_fail(tmp_path: Path) -> None:
    text = (
        "import os, safetensors\nos.rename(a, b)\npath.unlink()\nopen(p, 'r+b')\np.open('x')\nopen(p, 'rb')\nos.open(p)"
    )
    home = _tree(tmp_path, weightlab__ops__a=text, weightlab__ops__b="from os import rename\n")
    assert users("safetensors", home) == ["weightlab.ops.a"]
    assert sorted(changes(home / "weightlab/ops/a.py")) == [".unlink", "open('r+b')", "open('x')", "os.rename"]
    assert list(changes(home / "weightlab/ops/b.py")) == ["from os import …"]
