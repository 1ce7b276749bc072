"""The entry point: exit codes, error messages, signals, closed pipes, plug-ins."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from weightlab_cli import main

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from weightlab import errors
from weightlab.errors import Interrupted, MisfitError, WeightlabError
from weightlab.files import disk
from weightlab.version import __version__

PROGRAM = (sys.executable, "-m", "weightlab_cli")


def every(kind: type[WeightlabError]) -> Iterator[type[WeightlabError]]:
    for child in kind.__subclasses__():
        yield child
        yield from every(child)


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `weightlab status` raise something."""

    def set_up(error: BaseException) -> None:
        def status(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(wl, "status", status, raising=False)

    return set_up


def test_version(weightlab: Weightlab) -> None:
    ended = weightlab("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"weightlab {__version__}\n", "")


def test_without_a_command_the_help_comes_and_the_exit_code_says_usage(weightlab: Weightlab) -> None:
    ended = weightlab()
    assert ended.code == 2 and ended.out == "" and "Make a patch:" in ended.err


def test_an_unknown_command_is_answered_with_the_nearest(weightlab: Weightlab) -> None:
    ended = weightlab("aply", "x")
    assert ended.code == 2 and ended.out == ""
    wrong, remedy = ended.err.splitlines()
    assert wrong == "error: unknown command 'aply'"
    assert remedy.startswith("  → did you mean 'apply'? choose from apply, compare, compose, ")


def test_an_unknown_option_is_answered_with_the_nearest(weightlab: Weightlab) -> None:
    ended = weightlab("apply", "x", "--in-plac")
    assert ended.code == 2
    wrong, remedy = ended.err.splitlines()
    assert "--in-plac" in wrong and "--in-place" in wrong
    assert remedy == "  → see weightlab apply --help"


@pytest.mark.parametrize("words", [("apply",), ("diff", "a"), ("status", "a", "b"), ("--nothing",)])
def test_usage_errors(weightlab: Weightlab, words: tuple[str, ...]) -> None:
    ended = weightlab(*words)
    assert ended.code == 2 and ended.out == "" and len(ended.err.splitlines()) == 2
    assert weightlab(*words, "--json").error["remedy"].startswith("see weightlab ")


def test_an_empty_path_is_not_the_current_folder(weightlab: Weightlab, patches: Path) -> None:
    os.chdir("base")
    before = content(patches)
    for words in (("remove", "", "--all"), ("status", ""), ("apply", "", "../exact.safetensors", "--in-place")):
        ended = weightlab(*words)
        assert ended.code == 2 and "empty" in ended.err
    assert weightlab("apply", ".", "", "--in-place").code == 2
    assert weightlab("apply", ".", "../exact.safetensors", "-o", "").code == 2
    assert content(patches) == before


@pytest.mark.parametrize("kind", [WeightlabError, *every(WeightlabError)])
def test_every_error_has_its_exit_code_and_three_parts(
    weightlab: Weightlab, raising: Callable[[BaseException], None], kind: type[WeightlabError]
) -> None:
    raising(kind("what is wrong", "what to do", ["this tensor", "that tensor"]))
    ended = weightlab("status", "x")
    assert (ended.code, ended.out) == (kind.exit_code, "")
    assert ended.err == "error: what is wrong\n  this tensor\n  that tensor\n  → what to do\n"
    assert weightlab("status", "x", "--json").error == {
        "message": "what is wrong",
        "offenders": ["this tensor", "that tensor"],
        "remedy": "what to do",
        "exit_code": kind.exit_code,
    }


def test_exit_codes_are_those_of_the_design() -> None:
    codes = {kind: kind.exit_code for kind in every(WeightlabError) if kind.__bases__ == (WeightlabError,)}
    assert codes == {
        errors.UsageError: 2,
        errors.InputError: 3,
        errors.MisfitError: 4,
        errors.IntegrityError: 5,
        errors.BusyError: 6,
        errors.StorageError: 7,
    }


def test_many_offenders_are_cut_on_the_screen_and_whole_as_json(
    weightlab: Weightlab, raising: Callable[[BaseException], None]
) -> None:
    names = [f"layer.{i}" for i in range(100)]
    raising(MisfitError("they do not fit", "fit them", names))
    lines = weightlab("status", "x").err.splitlines()
    assert lines[:41] == ["error: they do not fit", *(f"  {n}" for n in names[:40])]
    assert lines[41:] == ["  … and 60 more (all of them with --json)", "  → fit them"]
    assert weightlab("status", "x", "--json").error["offenders"] == names


def test_names_cannot_command_the_terminal(weightlab: Weightlab, raising: Callable[[BaseException], None]) -> None:
    name = "red\x1b[31m\nerror: forged\r\u202e\udc80"
    raising(MisfitError("wrong", "", [name]))
    assert weightlab("status", "x").err == "error: wrong\n  red\\x1b[31m\\nerror: forged\\r\\u202e\\udc80\n"
    assert weightlab("status", "x", "--json").error["offenders"] == ["red\\x1b[31m\nerror: forged\\r\\u202e\\udc80"]


def test_a_bug_is_called_one(weightlab: Weightlab, raising: Callable[[BaseException], None]) -> None:
    raising(ZeroDivisionError("division by zero"))
    ended = weightlab("status", "x")
    assert ended.code == 1 and ended.out == ""
    wrong, remedy = ended.err.splitlines()
    assert wrong == "error: this is a bug in weightlab: ZeroDivisionError: division by zero"
    assert "--debug" in remedy
    assert "ZeroDivisionError" in weightlab("status", "x", "--json").error["message"]


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), MisfitError("oh"), OSError(28, "oh")])
def test_debug_shows_the_traceback_before_the_message(
    weightlab: Weightlab, raising: Callable[[BaseException], None], error: BaseException
) -> None:
    raising(error)
    ended = weightlab("status", "x", "--debug")
    assert ended.code == getattr(error, "exit_code", 7 if isinstance(error, OSError) else 1)
    assert ended.err.startswith("Traceback ") and f"\n{type(error).__name__}" in ended.err.replace(".", "\n")
    assert "\nerror: " in ended.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "w.safetensors"), "w.safetensors: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_exit_7(
    weightlab: Weightlab, raising: Callable[[BaseException], None], error: OSError, message: str
) -> None:
    raising(error)
    ended = weightlab("status", "x")
    assert ended.code == 7 and ended.err.splitlines()[0] == f"error: {message}"


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)],
)
def test_interrupted(
    weightlab: Weightlab, raising: Callable[[BaseException], None], error: BaseException, code: int
) -> None:
    raising(error)
    ended = weightlab("status", "x")
    assert ended.code == code and "interrupted" in ended.err
    assert weightlab("status", "x", "--json").error["exit_code"] == code


# Signals, as the console script handles them.


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., int]]:
    """Runs the console script in this process, with its signal handlers."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)  # a test run in the background has SIGINT ignored

    def console(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["weightlab", *words])
        with pytest.raises(SystemExit) as ended:
            main.cli()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    yield console
    for number, handler in before.items():
        signal.signal(number, handler)
    assert "Traceback" not in capsys.readouterr().err


def signalled(
    console: Callable[..., int], place: Path, number: int, *words: str
) -> Iterator[tuple[int, dict[str, str]]]:
    """Runs a command line with a signal after each operation on a file and after all that follow, from the first on.

    Yields:
        the exit code and what is in the folder then, until the command went through.
    """
    for step in range(1000):
        count = 0

        def fire(*_: Any, step: int = step) -> None:
            nonlocal count
            count += 1
            if count > step:  # the later ones come while the change is being undone
                os.kill(os.getpid(), number)

        disk.observer = fire
        try:
            code = console(*words)
        finally:
            disk.observer = None
        yield code, content(place)
        if count <= step:
            return
    pytest.fail("no end")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("", "apply base exact.safetensors --in-place"),
        ("dense.safetensors", "apply base exact.safetensors --in-place"),
        ("dense.safetensors", "scale base dense.safetensors -1"),
        ("dense.safetensors", "remove base --all"),
        ("dense.safetensors", "apply base exact.safetensors -o new"),
        ("", "apply base exact.safetensors -o new.safetensors"),
        ("", "diff base tuned -o again.safetensors"),
        ("", "compose dense.safetensors -o again"),
    ],
)
def test_a_signal_at_any_step_leaves_all_as_before_or_as_after(
    console: Callable[..., int], weightlab: Weightlab, patches: Path, on: str, words: str, number: int, code: int
) -> None:
    if on:
        wl.apply("base", on, in_place=True)
    before = content(patches)
    kept = shutil.copytree(patches, patches.parent / "kept")
    assert weightlab(*words.split()).code == 0
    after = content(patches)
    assert after != before
    shutil.rmtree(patches)
    kept.rename(patches)
    os.chdir(patches)
    undone = 0
    for ended, found in signalled(console, patches, number, *words.split()):
        assert found in (before, after)
        assert ended == code or (ended == 0 and found == after)
        if found == after:
            break
        undone += 1
    assert undone > 2


def test_the_next_signal_after_one_that_was_dealt_with_counts(console: Callable[..., int]) -> None:
    assert console("--version") == 0
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_while_an_earlier_one_is_dealt_with_is_dropped(console: Callable[..., int]) -> None:
    reached = []

    def change() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            try:
                raise OSError("on the way back")
            except OSError:
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("the end of the roll-back")

    assert console("--version") == 0
    with pytest.raises(Interrupted):
        change()
    assert reached


def test_a_signal_that_is_ignored_stays_ignored(console: Callable[..., int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert console("--version") == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


# Where stdout goes.


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--help",), 0), (("inspect", "base"), 0), (("status", "base", "--json"), 0), (("status", "no", "--json"), 3)],
)
def test_a_reader_that_goes_away_is_no_error(place: Path, words: tuple[str, ...], code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [("--version",), ("inspect", "base")])
def test_a_full_disk_under_stdout_is_exit_7(place: Path, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    assert done.stderr.splitlines()[0] == "error: stdout: No space left on device"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", ">&- 2>&- <&-", ">/dev/full 2>/dev/full"])
def test_what_is_done_is_done_whether_or_not_it_can_be_told(place: Path, redirection: str) -> None:
    """The patch goes on and comes off, with exit 0; no file of the model gets the number of a closed stream."""
    clean = Path("base/model.safetensors").read_bytes()
    wl.diff("base", "tuned", "p.safetensors")
    for words, same in (("apply base p.safetensors --in-place", False), ("remove base --all", True)):
        line = f"{shlex.join(PROGRAM)} {words} {redirection}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        told = "2>" not in redirection
        assert done.returncode == 0
        assert ("done, but the outcome could not be printed" in done.stderr) == told
        assert len(done.stderr.splitlines()) == int(told)
        assert (Path("base/model.safetensors").read_bytes() == clean) == same


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_what_only_prints_fails_where_nothing_can_be_printed(place: Path, redirection: str) -> None:
    wl.diff("base", "tuned", "p.safetensors")
    for words in ("inspect base", "apply base p.safetensors --in-place --dry-run"):
        line = f"{shlex.join(PROGRAM)} {words} {redirection}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 7
        assert done.stderr.startswith("error: stdout: ") and "Traceback" not in done.stderr


def test_an_encoding_without_our_characters(place: Path) -> None:
    """A matrix's shape has a × in it, and errors an arrow."""
    environment = os.environ | {"PYTHONIOENCODING": "koi8-r"}

    def ended(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*PROGRAM, *words], capture_output=True, check=False, env=environment)

    assert b" 24\\xd716 " in ended("inspect", "base", "--tensors").stdout
    assert ended("status", "no").stderr.splitlines()[1].startswith(b"  \\u2192 ")


# Commands of other packages.


def test_another_package_adds_a_command(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(
        'import click\n\n@click.command()\ndef command():\n    """Do more."""\n    click.echo("more was done")\n'
    )
    info = tmp_path / "extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[weightlab_cli.commands]\nmore = extra:command\nbroken = extra_that_is_not_there:command\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def output(*words: str) -> str:
        done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    section = " ".join(output("--help").partition("\nMore:\n")[2].split())
    assert " more Do more." in section
    assert "broken (cannot be loaded: ModuleNotFoundError: No module named 'extra_that_is_not_there')" in section
    assert output("more") == "more was done\n"
    assert output("--version") == f"weightlab {__version__}\n"


def test_the_shell_can_complete() -> None:
    environment = os.environ | {"_WEIGHTLAB_COMPLETE": "bash_complete", "COMP_WORDS": "weightlab ap", "COMP_CWORD": "1"}
    done = subprocess.run(PROGRAM, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["plain,apply"]
