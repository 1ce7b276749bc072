"""Imports point down: a module imports its own unit or a lower layer, never a neighbour."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "weightlab"
LAYERS = {
    "errors": 0,
    "version": 0,
    "registry": 1,
    "tensors": 1,
    "files": 2,
    "sources": 3,
    "encodings": 3,
    "stream": 4,
    "patches": 5,
    "stack": 6,
    "extract": 7,
    "ops": 8,
    "runtime": 9,
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        unit = path.relative_to(root).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue  # the face of the library: imports lazily from everywhere
        if unit not in LAYERS:
            found.append(f"{unit}: has no layer")
            continue
        for module in imports(path):
            words = module.split(".")
            if words[0] in ("weightlab_cli", "weightlab_evals"):
                found.append(f"{path.relative_to(root)} imports {module}")
            if words[0] != "weightlab" or len(words) == 1:
                continue
            other = words[1]
            if other != unit and LAYERS.get(other, 99) >= LAYERS[unit]:
                found.append(f"{path.relative_to(root)} imports {module}")
            if other != unit and words[-1].startswith("_"):
                found.append(f"{path.relative_to(root)} imports the helper {module}")
    return found


def test_layers_hold() -> None:
    assert violations(ROOT) == []


def test_only_the_container_knows_safetensors() -> None:
    users = [
        p.relative_to(ROOT) for p in ROOT.rglob("*.py") if any(m.split(".")[0] == "safetensors" for m in imports(p))
    ]
    assert users == [Path("files/container.py")]


def test_only_disk_changes_files() -> None:
    """Whatever changes a file is seen by the crash test."""
    changing = (
        "os.rename",
        "os.replace",
        "os.unlink",
        "os.remove",
        "os.pwrite",
        "os.fsync",
        "write_bytes",
        "write_text",
    )
    offenders = [
        f"{path.relative_to(ROOT)}: {call}"
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT) != Path("files/disk.py")
        for call in changing
        if call in path.read_text(encoding="utf-8")
    ]
    assert offenders == []


def test_this_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.py").write_text("def f():\n    from weightlab.ops.apply import apply\n")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "b.py").write_text("import weightlab.encodings.dense\n")
    (tmp_path / "elsewhere.py").write_text("")
    assert violations(tmp_path) == [
        "elsewhere: has no layer",
        "files/a.py imports weightlab.ops.apply",
        "sources/b.py imports weightlab.encodings.dense",
    ]
