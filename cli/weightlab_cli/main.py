"""The entry point: finds commands, turns errors into messages and exit codes, and signals into roll-backs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from weightlab.errors import Interrupted, UsageError, WeightlabError
from weightlab.registry import Registry
from weightlab.version import __version__
from weightlab_cli.output import print_error

COMMANDS: Registry[click.Command] = Registry("weightlab_cli.commands", "command", "command")

_SECTIONS = {
    "Make patches": ("diff", "compose"),
    "Put them on a model": ("apply", "remove", "scale", "status"),
    "Look": ("inspect", "verify"),
}


class _Commands(click.Group):
    """A group whose commands are modules, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return COMMANDS.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS.get(cmd_name) if cmd_name in COMMANDS.names() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS.names():
            COMMANDS.get(args[0])  # raises the error that suggests the nearest name
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        placed = {name for section in _SECTIONS.values() for name in section}
        sections = {**_SECTIONS, "More": tuple(n for n in names if n not in placed)}
        for title, members in sections.items():
            rows = [(n, COMMANDS.get(n).get_short_help_str(80)) for n in members if n in names]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="weightlab", message="%(prog)s %(version)s")
def commands() -> None:
    """Arithmetic on model weights: take a difference, keep it as a patch, put it on a model, take it off again.

    \b
    Example:
      weightlab diff base/ tuned/ -o change.safetensors
      weightlab apply base/ change.safetensors@0.5 --in-place
      weightlab remove base/ change.safetensors
    """


def _interrupt(number: int, _frame: object) -> None:
    raise Interrupted(number)


def run(args: Sequence[str]) -> int:
    """Runs one command line; returns its exit code."""
    as_json, debug = "--json" in args, "--debug" in args
    try:
        code = commands.main(args=list(args), prog_name="weightlab", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0  # click returns the code of an early exit
    except WeightlabError as error:
        shown: WeightlabError = error
    except click.ClickException as error:
        shown = UsageError(error.format_message(), _hint(error))
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        print_error(WeightlabError("interrupted; everything is as before"), as_json)
        return error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 0
    except OSError as error:
        shown = WeightlabError(
            f"{error.filename or 'system call'}: {error.strerror or error}", "check the path and the disk"
        )
        shown.exit_code = 7
    except Exception as error:
        if not debug:
            shown = WeightlabError(
                f"a bug in weightlab: {type(error).__name__}: {error}",
                "run it again with --debug and report what it prints",
            )
            print_error(shown, as_json)
            return 1
        traceback.print_exc()
        return 1
    if debug:
        traceback.print_exc()
    print_error(shown, as_json)
    return shown.exit_code


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see {context.command_path} --help" if context is not None else "see weightlab --help"


def cli() -> NoReturn:
    """The console script."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:]))
