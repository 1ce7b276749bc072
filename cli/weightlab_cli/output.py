"""What commands print: tables and lines for people, one JSON object for programs, a progress bar for the patient."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from weightlab.errors import WeightlabError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOWN = 40  # offenders on the screen
_FOLDED = 12  # columns that are left to a name on a narrow terminal


def print_error(error: WeightlabError, as_json: bool) -> None:
    """One line for what is wrong, one for each offender, one for what to do; as JSON on stdout when asked."""
    if as_json:
        tree = {
            "message": error.message,
            "offenders": list(error.offenders),
            "remedy": error.remedy,
            "exit_code": error.exit_code,
        }
        click.echo(json.dumps({"error": tree}))
        return
    lines = [f"error: {printable(error.message)}", *(f"  {printable(o)}" for o in error.offenders[:_SHOWN])]
    if len(error.offenders) > _SHOWN:
        lines.append(f"  … and {len(error.offenders) - _SHOWN} more (all of them with --json)")
    if error.remedy:
        lines.append(f"  → {printable(error.remedy)}")
    click.echo("\n".join(lines), err=True)


def printable(text: str) -> str:
    """Text from files as one line that is safe on a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def plain(value: Any) -> Any:
    """A report as JSON values; a number that JSON cannot write (infinity, NaN) is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """Where a command's result goes."""

    json: bool
    quiet: bool

    def result(self, report: Any, **more: Any) -> None:
        """The one object on stdout, when programs listen: a dataclass or mapping, and further entries."""
        if self.json:
            click.echo(json.dumps(plain(report) | plain(more), allow_nan=False))

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not (self.json or self.quiet):
            click.echo(printable(text))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table for people; one whose columns have no titles has no head.

        Columns whose title begins with `#` are numbers: aligned to the right and never broken. Columns without content
        are left out.
        """
        if self.json or self.quiet or not rows:
            return
        filled = [i for i in range(len(columns)) if any(row[i] for row in rows)]
        click.echo(_drawn([columns[i] for i in filled], [[row[i] for i in filled] for row in rows], title))


def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """On a terminal names are folded to its width, and numbers never; else a row a line, without styles."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [[printable(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    widest = least = 2 * (len(columns) - 1)
    for index, column in enumerate(columns):
        number, head = column.startswith("#"), column.lstrip("#")
        table.add_column(Text(head), justify="right" if number else "left", no_wrap=number, overflow="fold")
        width = max(cell_len(text) for text in (head, *(row[index] for row in rows)))
        widest += width
        least += width if number else min(width, _FOLDED)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = sys.stdout.isatty()
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=terminal, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False
    )
    console.width = max(console.width, least) if terminal else widest
    console.print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([printable(title), *lines] if title else lines)


class Bar:
    """A progress bar on stderr, with rate and time left: on a terminal, and on work of over a second only."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr.isatty()
        self._begun = time.monotonic()
        self._done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, done: int, total: int) -> None:
        """Called by the library, under its own lock, with bytes done and in all; once more from 0 for each pass."""
        if not self._wanted or time.monotonic() - self._begun < 1.0:
            return
        if self._bar is None or self._task is None:
            self._bar = self._made()
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        elif done < self._done:
            self._bar.reset(self._task, total=total)
        self._done = done
        self._bar.update(self._task, completed=done, total=total)

    @staticmethod
    def _made() -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        return Progress(*columns, console=Console(stderr=True), transient=True)
