"""Whether the tests notice: changes one thing in the library at a time and runs the tests of its folder.

    python tests/mutants.py --count 200 --seed 0 --workers 2

A change is a comparison turned (`<` to `<=`, `==` to `!=`, `in` to `not in`), an operator exchanged (`+` for `-`, `and`
for `or`), a number one larger, a truth value flipped or a condition negated. A sample of all that are possible is drawn
by the seed. Each is made in a copy of the project and judged by the tests in the folder of `tests/` that mirrors the
file's own (for a file of no folder, the tests in none; for one that is named after another folder, as `ops/stack.py`
is, the tests of both): first those that run the changed function, the quick ones
first, then all others of the folder. A change that no test notices is printed with its line: it lacks a test, or it is
equivalent. Tests that fail before anything is changed are named and notice nothing.

Left alone, because no test can or need tell them apart:

- annotations, what only the type checker reads, options of decorators and data classes, texts of errors, assertions;
- `strict=` of zip, a check of the code on itself;
- limits and sizes of buffers: numbers of 1,000 and more in a constant of a module in capitals, and powers of two as
  arguments (`os.read(fd, 2**24)`). One more is the same;
- numbers in the files that draw (`plot*.py`): sizes and colours are looked at, not tested.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import SimpleQueue, get_context
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SLOWER = 5  # times what the tests take unchanged, and 30 seconds: longer is hanging, and that is noticed
MEMORY = 16 << 30  # bytes of address space of one run; a change that asks for more fails
HEAVY = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "peft",
    "hypothesis",
    "safetensors.torch",
    "rich",
    "yaml",
)  # imported once, by the process that forks

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
    """One change. `node`: its place in the order of `ast.walk`; `part`: which operator of a chain.

    `lines`: first and last line of the function or method that it is in, (0, 0) outside of all.
    """

    file: Path
    node: int
    part: int
    what: str
    lines: tuple[int, int]

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
    """All changes of one file, but for what the head of this script leaves alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        for inner in _left_alone(node):
            skipped.update(id(below) for below in ast.walk(inner))
    for statement in tree.body:
        skipped.update(id(number) for number in _limits(statement))
    functions = _functions(tree)
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        number = getattr(node, "lineno", 0)
        lines = next(((a, b) for a, b in functions if a <= number <= b), (0, 0))
        line = f"{number}: "
        shown = ast.unparse(node).splitlines()[0][:100] if isinstance(node, ast.expr | ast.stmt) else ""
        if isinstance(node, ast.Compare):
            for part, operator in enumerate(node.ops):
                yield Mutant(file, index, part, f"{line}{shown}  [{type(operator).__name__}]", lines)
        elif isinstance(node, ast.BoolOp) or _is_arithmetic(node):
            yield Mutant(file, index, 0, f"{line}{shown}  [{type(getattr(node, 'op', None)).__name__}]", lines)
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int) and not file.stem.startswith("plot"):
            yield Mutant(file, index, 0, f"{line}constant {node.value!r}", lines)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Mutant(file, index, 0, f"{line}{shown}  [negated]", lines)


def _functions(tree: ast.Module) -> list[tuple[int, int]]:
    """First and last lines of all functions and methods, with their decorators; not of those inside others."""
    found = []
    for node in tree.body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(inner, ast.FunctionDef):
                first = min([inner.lineno, *(decorator.lineno for decorator in inner.decorator_list)])
                found.append((first, inner.end_lineno or inner.lineno))
    return found


def _left_alone(node: ast.AST) -> Iterator[ast.AST]:
    """What in a node never decides anything at run time, or is no matter for a test."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield node.annotation
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        yield node.returns
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield node
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("overload", "dataclass", "TypeVar"):
            yield node
        if called == "zip":
            yield from node.keywords
        yield from (given for given in node.args if _is_power(given))
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
        yield node
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield from node.decorator_list


def _is_power(node: ast.AST) -> bool:
    """Whether that is `2**24` or `64 << 20`."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Pow | ast.LShift):
        return False
    return isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)


def _limits(statement: ast.stmt) -> Iterator[ast.AST]:
    """The parts of a statement `NAME_IN_CAPITALS = 64 << 20`: a whole number of 1,000 or more made of numbers alone."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    if not all(isinstance(target, ast.Name) and target.id.isupper() for target in targets):
        return
    parts = list(ast.walk(statement.value))
    if all(isinstance(part, ast.BinOp | ast.Constant | ast.operator) for part in parts):
        value = eval(compile(ast.Expression(statement.value), "limit", "eval"))
        if isinstance(value, int) and value >= 1000:
            yield from parts


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether it is an operator that can be exchanged; on texts another one is an error at once."""
    if not isinstance(node, ast.BinOp | ast.AugAssign) or type(node.op) not in _OPERATORS:
        return False
    sides = [node.value] if isinstance(node, ast.AugAssign) else [node.left, node.right]
    texts = [isinstance(s, ast.JoinedStr) or (isinstance(s, ast.Constant) and isinstance(s.value, str)) for s in sides]
    return not any(texts)


def folder_of(file: Path) -> list[str]:
    """What pytest is given for a file of the library: the folder that mirrors its own, or the tests in none.

    The first word of a file's name may be another folder's (`ops/stack.py`, `extract/_adapter_places.py`): then its
    tests lie there too.
    """
    inside = file.relative_to(ROOT / "weightlab").parts
    word = file.stem.strip("_").split("_")[0]
    if len(inside) > 1 and (ROOT / "tests" / inside[0]).is_dir():
        named = [inside[0], *(name for name in (word, f"{word}s") if name != inside[0])]
        return [f"tests/{name}" for name in named if (ROOT / "tests" / name).is_dir()]
    return sorted(str(test.relative_to(ROOT)) for test in (ROOT / "tests").glob("test_*.py"))


@dataclass
class Watch:
    """A plug-in of pytest that keeps how long each test takes, which functions of the library it calls, what fails."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        library = str(Path.cwd() / "weightlab")
        seen = self.calls.setdefault(item.nodeid, set())

        def called(frame: FrameType, _event: str, _argument: object) -> None:
            code = frame.f_code
            if code.co_filename.startswith(library):
                seen.add((code.co_filename[len(library) + 1 :], code.co_firstlineno))

        begun = time.monotonic()
        sys.settrace(called)
        threading.settrace(called)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - begun


class Order:
    """A plug-in of pytest that runs these tests, in this order, or all but these and those that `never` run."""

    def __init__(self, first: Sequence[str], others: bool, never: set[str]) -> None:
        self.first, self.others, self.never = list(first), others, never

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        chosen = [by_name[name] for name in self.first if name in by_name]
        left_out = {*self.first, *self.never}
        items[:] = [item for item in items if item.nodeid not in left_out] if self.others else chosen


def forked(place: Path, arguments: list[str], plugin: object, answer: Callable[[], object] = lambda: None) -> int:
    """Starts pytest in a copy of the project, in a child of this process, which has the large libraries already.

    Returns its process id; what it printed lies in `place/printed`, what `answer` gave in `place/answer`.
    """
    assert "weightlab" not in sys.modules, "the child would not see the change"
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        printed = os.open(place / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(printed, descriptor)
        os.chdir(place)
        homes = [str(place / part) for part in ("", "cli", "evals")]
        sys.path[:] = homes + [path for path in sys.path if not Path(path or ".").is_relative_to(ROOT / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(homes)
        sys.dont_write_bytecode = True
        options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*options, *arguments], plugins=[plugin]))
        (place / "answer").write_text(repr(answer()), encoding="utf-8")
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int, limit: float) -> int:
    """Waits for such a child and returns its exit code, or -1 where it took too long; no process of it stays."""
    end = time.monotonic() + limit
    code = -1
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        return code
    if code == -1:
        os.waitpid(child, 0)
    return code


def unchanged(tests: list[str], place: Path) -> Watch:
    """Runs tests in a copy before anything in it is changed. Raises RuntimeError where they cannot be run."""
    watch = Watch()
    child = forked(place, tests, watch, lambda: (watch.seconds, watch.calls, watch.failed or {""}))
    if (code := ended(child, 3600)) not in (0, 1):
        raise RuntimeError(
            f"{tests} fail unchanged ({code}):\n{(place / 'printed').read_text(encoding='utf-8')[-4000:]}"
        )
    watch.seconds, watch.calls, watch.failed = ast.literal_eval((place / "answer").read_text(encoding="utf-8"))
    return watch


def noticed(mutant: Mutant, place: Path, watch: Watch) -> bool:
    """Makes the change in a copy of the project and says whether a test of its folder fails."""
    target = place / mutant.file.relative_to(ROOT)
    target.write_text(mutant.source(), encoding="utf-8")
    name, (first, last) = str(mutant.file.relative_to(ROOT / "weightlab")), mutant.lines
    near = {test for test, calls in watch.calls.items() if any(f == name and first <= n <= last for f, n in calls)}
    if not mutant.lines[1]:  # at import: whichever test uses the module
        near = {test for test, calls in watch.calls.items() if any(f == name for f, _ in calls)}
    near -= watch.failed
    order = sorted(near, key=lambda test: watch.seconds[test])
    turns = [(sorted({test.partition("::")[0] for test in order}), False)] if order else []
    try:
        for tests, others in [*turns, (folder_of(mutant.file), True)]:
            limit = SLOWER * sum(s for test, s in watch.seconds.items() if (test in near) != others) + 30
            code = ended(forked(place, ["-x", *tests], Order(order, others, watch.failed)), limit)
            if code not in (0, 5):  # 5: all tests of the folder are in the first turn
                return True
        return False
    finally:
        shutil.copyfile(mutant.file, target)


def copied(place: Path) -> Path:
    """A copy of the project."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in tracked.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    return place


_place = Path()  # a worker's own copy
_watches: dict[str, Watch] = {}  # by what pytest is given


def _begin(places: SimpleQueue[Path]) -> None:
    global _place  # noqa: PLW0603 - one for each process
    _place = places.get()


def _judge(mutant: Mutant) -> bool:
    return noticed(mutant, _place, _watches[str(folder_of(mutant.file))])


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
    begun = time.monotonic()
    missed: list[Mutant] = []
    for library in HEAVY:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="weightlab-mutants-") as home:
        places: SimpleQueue[Path] = SimpleQueue()
        for index in range(options.workers):
            places.put(first := copied(Path(home) / str(index)))
        for tests in {str(folder_of(mutant.file)): folder_of(mutant.file) for mutant in chosen}.values():
            _watches[str(tests)] = unchanged(tests, first)
            print(f"     {time.monotonic() - begun:6.0f} s  unchanged  {tests[0]}", flush=True)
            for test in sorted(_watches[str(tests)].failed - {""}):
                print(f"                    FAILS UNCHANGED  {test}", flush=True)
        with ProcessPoolExecutor(options.workers, get_context("fork"), _begin, (places,)) as pool:
            for index, (mutant, seen) in enumerate(zip(chosen, pool.map(_judge, chosen), strict=True), 1):
                missed += [] if seen else [mutant]
                state = "noticed" if seen else "MISSED "
                print(f"{index:4d} {time.monotonic() - begun:6.0f} s  {state}  {mutant}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} noticed", flush=True)
    return int(len(missed) * 10 > len(chosen))


# What numerical libraries read when they are imported, and hypothesis: no threads, no network, the same every time.
SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}

if __name__ == "__main__":
    os.environ.update(SETTINGS)
    os.environ.setdefault("WEIGHTLAB_TEST_CACHE", str(ROOT / ".cache" / "wheels"))
    sys.exit(main())
