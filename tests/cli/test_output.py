"""Tables, numbers and the progress bar."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path

import pytest
from weightlab_cli.main import run
from weightlab_cli.output import Bar, Output, plain, printable, size

from weightlab.ops.outcome import Outcome, PatchOnInfo

LONG = "model.layers.10.a_module_with_a_long_name.and_one_more.weight"
ROWS = [[LONG, "1,234,567", ""], ["b", "12", ""]]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, columns: int = 80, **environment: str) -> str:
    """The table as it is printed to a stream."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream)
    Output(json=False, quiet=False).table(["tensor", "#parameters", "#nothing"], ROWS, "title")
    return stream.getvalue()


def test_a_table_in_a_pipe_is_plain_and_has_a_row_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    width = len(LONG) + 2 + len("parameters")
    numbers = [
        line.rjust(width - len(name)) for name, line in (("tensor", "parameters"), (LONG, "1,234,567"), ("b", "12"))
    ]
    expected = ["title", f"tensor{numbers[0]}", f"{LONG}{numbers[1]}", f"b{numbers[2]}"]
    for environment in ({}, {"FORCE_COLOR": "1"}):
        assert drawn(monkeypatch, io.StringIO(), 20, **environment).splitlines() == expected


def test_a_narrow_terminal_folds_names_and_keeps_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, Terminal(), 30, NO_COLOR="1").splitlines()
    assert max(map(len, lines)) <= 30
    assert any(line.endswith(" 1,234,567") for line in lines)
    assert "".join(line.split()[0] for line in lines[2:-1]) == LONG


def test_a_terminal_too_narrow_for_the_numbers_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, Terminal(), 6, NO_COLOR="1")
    assert "1,234,567" in text and "…" not in text


def test_colours_and_styles_on_a_terminal_only_and_not_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in drawn(monkeypatch, Terminal())
    assert "\x1b" not in drawn(monkeypatch, Terminal(), NO_COLOR="1")
    assert "\x1b" not in drawn(monkeypatch, Terminal(), TERM="dumb")
    assert "\x1b" not in drawn(monkeypatch, io.StringIO())


def test_columns_without_content_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing" not in drawn(monkeypatch, io.StringIO())


def test_a_table_without_rows_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=False, quiet=False).table(["a"], [])
    assert capsys.readouterr().out == ""


def test_cells_cannot_command_the_terminal_nor_be_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=False, quiet=False).table(["name"], [["[red]x[/red]\x1b[2J\n"]])
    assert capsys.readouterr().out.splitlines()[1] == "[red]x[/red]\\x1b[2J\\n"


def test_printable_keeps_what_people_write() -> None:
    assert printable("Ω×→ 漢字.weight") == "Ω×→ 漢字.weight"
    assert printable("a\tb\x00\u200b") == "a\\tb\\x00\\u200b"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (5e9, "5.00 GB"), (2.5e12, "2500.00 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_reports_as_json_values() -> None:
    report = Outcome("m", patches=[PatchOnInfo("id", "p", 0.5)], notes=["n"])
    assert plain(report)["patches"] == [{"id": "id", "name": "p", "scale": 0.5}]
    assert plain({1: (math.inf, -math.inf, math.nan, 1.5, None, True, "x")}) == {
        "1": [None] * 3 + [1.5, None, True, "x"]
    }


class Clock:
    """Time that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    """Makes a stream stderr. (Not a fixture: pytest sets up its own after those.)"""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_the_bar_comes_after_a_second_and_goes_at_the_end(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    screen = stderr(monkeypatch, Terminal())
    with Bar(wanted=True) as bar:
        bar.report(1_000_000, 8_000_000)
        assert screen.getvalue() == ""
        clock.now += 1.5
        bar.report(2_000_000, 8_000_000)
        bar.report(4_000_000, 8_000_000)
        shown = bar._bar
        assert shown is not None
        shown.refresh()
        assert "4.0/8.0 MB" in screen.getvalue()
        (task,) = shown.tasks
        assert task.percentage == 50
    assert screen.getvalue().endswith("\x1b[2K")  # the line is cleared


def test_the_bar_starts_again_with_each_pass(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    stderr(monkeypatch, Terminal())
    with Bar(wanted=True) as bar:
        clock.now += 2
        bar.report(8, 8)
        bar.report(2, 8)
        assert bar._bar is not None
        (task,) = bar._bar.tasks
        assert (task.completed, task.total, task.finished) == (2, 8, False)
        bar.report(3, 300)
        assert (task.completed, task.total) == (3, 300)


@pytest.mark.parametrize("kind", ["not wanted", "not a terminal", "less than a second"])
def test_no_bar(kind: str, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    stream = stderr(monkeypatch, io.StringIO() if kind == "not a terminal" else Terminal())
    with Bar(wanted=kind != "not wanted") as bar:
        clock.now += 0.9 if kind == "less than a second" else 60
        bar.report(1, 2)
    assert stream.getvalue() == ""


def test_a_command_draws_its_bar_on_stderr(clock: Clock, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Each look at the clock takes two seconds here, so that the work seems long."""
    screen = stderr(monkeypatch, Terminal())

    def late() -> float:
        clock.now += 2
        return clock.now

    monkeypatch.setattr(time, "monotonic", late)
    for words, expected in ((("inspect", "base"), True), (("inspect", "base", "--quiet"), False)):
        screen.truncate(0)
        screen.seek(0)
        assert run(words) == 0
        assert ("━" in screen.getvalue()) is expected
