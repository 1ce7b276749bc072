"""The entry point: finds commands, turns errors into messages and exit codes, and signals into roll-backs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

from weightlab.errors import Interrupted, StorageError, UsageError, WeightlabError
from weightlab.files import disk
from weightlab.registry import Registry
from weightlab.version import __version__
from weightlab_cli.output import print_error
from weightlab_cli.streams import Unprinted, drop_stdout, open_closed_streams, prepare_streams, unprinted

_NAME = "weightlab"
_COMPLETE = "_WEIGHTLAB_COMPLETE"  # set by the shell when it wants to complete a line
COMMANDS: Registry[click.Command] = Registry("weightlab_cli.commands", "command", "command")

_SECTIONS = {
    "Make a patch": ("diff", "signature", "compose"),
    "Put it on a model": ("apply", "remove", "scale", "status"),
    "Look": ("inspect", "compare", "identify", "verify", "eval"),
}


class _Commands(click.Group):
    """A group whose commands are modules, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return COMMANDS.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS.get(cmd_name) if cmd_name in COMMANDS.names() else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS.names() and not ctx.resilient_parsing:
            COMMANDS.get(args[0])  # raises the error that suggests the nearest name
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        placed = {name for section in _SECTIONS.values() for name in section}
        sections = {**_SECTIONS, "More": tuple(n for n in names if n not in placed)}
        for title, members in sections.items():
            rows = [(n, _summary(n)) for n in members if n in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _summary(name: str) -> str:
    try:
        return COMMANDS.get(name).get_short_help_str(200)
    except Exception as error:  # of another package: its fault must not take the help of all others away
        return f"(cannot be loaded: {type(error).__name__}: {error})"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=_NAME, message="%(prog)s %(version)s")
def commands() -> None:
    """Arithmetic on model weights: take a difference, keep it as a patch, put it on a model, take it off again.

    \b
    Example:
      weightlab diff base/ tuned/ -o change.safetensors
      weightlab apply base/ change.safetensors@0.5 --in-place
      weightlab remove base/ change.safetensors

    Exit codes: 0 done, 2 usage, 3 bad or missing input, 4 does not fit, 5 integrity, 6 busy, 7 disk or permission,
    1 a bug, 130 and 143 interrupted.
    """


def invoke(args: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; whatever goes wrong is raised."""
    try:  # not click's own `main`, which ends the process when the reader of a pipe has gone
        with commands.make_context(_NAME, list(args)) as context:
            commands.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def run(args: Sequence[str]) -> int:
    """Runs one command line; prints what goes wrong and returns the exit code."""
    as_json, debug = "--json" in args, "--debug" in args
    begun = disk.finished.total()
    try:
        code = invoke(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `weightlab … | head`: whoever read has seen enough
        drop_stdout()
        return 0
    except Unprinted as error:
        drop_stdout()
        done = disk.finished.total() > begun and "--dry-run" not in args
        return unprinted(error, done=done)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        shown = _shown(error)
        try:
            print_error(shown, as_json)
            sys.stdout.flush()
        except OSError:
            drop_stdout()
        return shown.exit_code


def _shown(error: BaseException) -> WeightlabError:
    """What the user is told."""
    if isinstance(error, WeightlabError):
        return error
    if isinstance(error, Interrupted | KeyboardInterrupt):
        shown = WeightlabError(
            "interrupted: nothing is left half done", "`weightlab status MODEL` says what is on a model"
        )
        shown.exit_code = error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
        return shown
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), _hint(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return StorageError(f"{where}{error.strerror or error}", "check the path, its permissions and the disk")
    return WeightlabError(
        f"this is a bug in weightlab: {type(error).__name__}: {error}",
        "run the command again with --debug and report what it prints",
    )


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see {context.command_path if context is not None else _NAME} --help"


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Raises `Interrupted`, except while an earlier one is being handled: a roll-back is not broken off."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Interrupted):
            return
        error = error.__context__
    raise Interrupted(number)


def cli() -> NoReturn:
    """The console script."""
    open_closed_streams()
    # torch makes hundreds of thousands of objects that stay: looking through them for cycles, again and again while it
    # is imported and three times on the way out, would take a second.
    gc.set_threshold(100_000, 50, 1000)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in the background of a script
            signal.signal(number, _interrupt)
    prepare_streams()
    if _COMPLETE in os.environ:
        sys.exit(shell_complete(commands, {}, _NAME, _COMPLETE, os.environ[_COMPLETE]))
    try:
        code = run(sys.argv[1:])
    except Interrupted as late:  # while the outcome was being printed
        code = late.exit_code
    gc.freeze()
    sys.exit(code)
