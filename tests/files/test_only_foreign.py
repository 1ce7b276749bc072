"""JSON and YAML are read in one place: nothing else in the packages calls a parser of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import weightlab

ROOT = Path(weightlab.__file__).parents[1]
PARSERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "yaml": {"load", "safe_load", "full_load", "unsafe_load", "load_all", "safe_load_all", "parse", "compose"},
    "tomllib": {"load", "loads"},
}
METHODS = {"model_validate_json", "validate_json", "parse_raw", "parse_file"}
KEEPS_ITS_OWN = {
    "evals/weightlab_evals/kept.py",
    "evals/weightlab_evals/transfer/study.py",
}
"""What they read they have written, as findings of any form."""


def parsing(path: Path) -> Iterator[str]:
    """The calls and imports in a file by which JSON or YAML is parsed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in PARSERS:
            yield f"from {node.module} import …"
        elif isinstance(node, ast.Attribute):
            home = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in PARSERS.get(home, ()) or node.attr in METHODS:
                yield f"{home}.{node.attr}"


def test_only_foreign_parses_json_and_yaml() -> None:
    packages = ("weightlab", "cli/weightlab_cli", "evals/weightlab_evals")
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): sorted(set(parsing(path))) for path in files}
    assert found.pop("weightlab/files/foreign.py") == ["json.loads", "yaml.load"]
    assert {file: calls for file, calls in found.items() if calls and file not in KEEPS_ITS_OWN} == {}


def test_that_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import json\nfrom yaml import safe_load\njson.loads(x)\njson.dumps(x)\nA.model_validate_json(b)\n")
    assert sorted(parsing(path)) == ["A.model_validate_json", "from yaml import …", "json.loads"]
