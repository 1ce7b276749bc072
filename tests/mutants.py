"""Whether the tests notice: changes one thing in the library at a time and runs the tests of its folder.

    python tests/mutants.py --count 200 --seed 0 --workers 2

A change is a comparison turned (`<` to `<=`, `==` to `!=`, `in` to `not in`), an operator exchanged (`+` for `-`, `and`
for `or`), a number one larger, a truth value flipped or a condition negated. A sample of all that are possible is drawn
by the seed. Each is made in a copy of the project, and the tests that mirror its file run first, then those of its
folder. A change that no test notices is printed with its line: it lacks a test, or it is equivalent.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
LONGEST = 600  # seconds that the tests of a folder may take; a change that makes them hang is noticed

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change. `node`: its place in the order of `ast.walk`; `part`: which operator of a chain."""

    file: Path
    node: int
    part: int
    what: str

    def source(self) -> str:
        """The changed file."""
        tree = ast.parse(self.file.read_text(encoding="utf-8"))
        _change(list(ast.walk(tree))[self.node], self.part)
        return ast.unparse(ast.fix_missing_locations(tree))

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.what}"


def _change(node: ast.AST, part: int) -> None:
    if isinstance(node, ast.Compare):
        node.ops[part] = _COMPARISONS[type(node.ops[part])]()
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    elif isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        node.test = ast.UnaryOp(ast.Not(), copy.copy(node.test))
    else:
        raise TypeError(node)


def mutants_in(file: Path) -> Iterator[Mutant]:
    """All changes of one file; annotations, texts and checks for the type checker are left alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        for inner in _not_run(node):
            skipped.update(id(below) for below in ast.walk(inner))
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        line = f"{getattr(node, 'lineno', 0)}: "
        shown = ast.unparse(node).splitlines()[0][:100] if isinstance(node, ast.expr | ast.stmt) else ""
        if isinstance(node, ast.Compare):
            for part, operator in enumerate(node.ops):
                yield Mutant(file, index, part, f"{line}{shown}  [{type(operator).__name__}]")
        elif isinstance(node, ast.BoolOp) or _is_arithmetic(node):
            yield Mutant(file, index, 0, f"{line}{shown}  [{type(getattr(node, 'op', None)).__name__}]")
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
            yield Mutant(file, index, 0, f"{line}constant {node.value!r}")
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Mutant(file, index, 0, f"{line}{shown}  [negated]")


def _not_run(node: ast.AST) -> Iterator[ast.AST]:
    """What in a node never decides anything at run time."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield node.annotation
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        yield node.returns
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield node
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("overload", "dataclass", "TypeVar"):
        yield node
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
        yield node
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield from node.decorator_list


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether it is an operator that can be exchanged; on texts another one is an error at once."""
    if not isinstance(node, ast.BinOp | ast.AugAssign) or type(node.op) not in _OPERATORS:
        return False
    sides = [node.value] if isinstance(node, ast.AugAssign) else [node.left, node.right]
    texts = [isinstance(s, ast.JoinedStr) or (isinstance(s, ast.Constant) and isinstance(s.value, str)) for s in sides]
    return not any(texts)


def tests_of(file: Path) -> list[list[str]]:
    """The tests to run for a file, in turns: those of its own name, then those of its folder."""
    inside = file.relative_to(ROOT / "weightlab").parts
    folder = ROOT / "tests" / inside[0] if len(inside) > 1 else ROOT / "tests"
    if not folder.is_dir():
        folder = ROOT / "tests"
    own = folder / f"test_{file.stem.strip('_')}.py"
    every = sorted(folder.glob("test_*.py")) if folder == ROOT / "tests" else [folder]
    turns = [[own], every] if own.is_file() else [every]
    return [[str(test.relative_to(ROOT)) for test in turn] for turn in turns]


def noticed(mutant: Mutant, place: Path) -> bool:
    """Makes the change in a copy of the project and says whether a test fails."""
    target = place / mutant.file.relative_to(ROOT)
    target.write_text(mutant.source(), encoding="utf-8")
    path = os.pathsep.join(str(place / part) for part in ("", "cli", "evals"))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CI": "1"}
    environment.setdefault("WEIGHTLAB_TEST_CACHE", str(ROOT / ".cache" / "wheels"))
    try:
        for tests in tests_of(mutant.file):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            done = subprocess.run(
                command, cwd=place, env=environment, capture_output=True, timeout=LONGEST, check=False
            )
            if done.returncode:
                return True
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        shutil.copyfile(mutant.file, target)


def copies(count: int, home: Path) -> Queue[Path]:
    """Copies of the project, one for each worker."""
    free: Queue[Path] = Queue()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for index in range(count):
        place = home / str(index)
        for name in tracked.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, place / name)
        free.put(place)
    return free


def main() -> int:
    """Returns 1 where fewer than nine tenths of the changes are noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", metavar="PREFIX", help="files below weightlab/ that begin so")
    options = parser.parse_args()
    files = sorted(
        f for f in (ROOT / "weightlab").rglob("*.py") if str(f.relative_to(ROOT / "weightlab")).startswith(options.only)
    )
    every = [mutant for file in files for mutant in mutants_in(file)]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(chosen)} of {len(every)} changes in {len(files)} files, seed {options.seed}", flush=True)
    missed: list[Mutant] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="weightlab-mutants-") as home, ThreadPoolExecutor(options.workers) as pool:
        free = copies(options.workers, Path(home))

        def judge(mutant: Mutant) -> bool:
            place = free.get()
            try:
                return noticed(mutant, place)
            finally:
                free.put(place)

        for index, (mutant, seen) in enumerate(zip(chosen, pool.map(judge, chosen), strict=True), 1):
            missed += [] if seen else [mutant]
            state = "noticed" if seen else "MISSED "
            print(f"{index:4d} {time.monotonic() - begun:6.0f} s  {state}  {mutant}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} noticed", flush=True)
    return int(len(missed) * 10 > len(chosen))


if __name__ == "__main__":
    sys.exit(main())
