"""stdin, stdout and stderr as the command line finds them: closed, full, or read by no one any more.

What a command has done stays done whether or not it could be told.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from weightlab.errors import StorageError
from weightlab_cli.output import print_error


class Unprinted(OSError):
    """stdout cannot be written to: it is closed, or its disk is full."""


class _Stdout(io.FileIO):
    """The descriptor of stdout; errors of writing there are told from all others."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unprinted(error.errno, error.strerror) from error


def open_closed_streams() -> None:
    """Opens the standard descriptors that are closed, so that no file of a model gets one of their numbers.

    A warning that a library writes to descriptor 2 would otherwise land in whatever file had been opened as 2. Nothing
    can be written to the stdout that is opened here, as nothing could before.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # gets the lowest number, this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def prepare_streams() -> None:
    """Makes stdout tell what goes wrong with it, and both streams take any character."""
    if _descriptor(sys.stdout) in (None, 1):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        file = io.BufferedWriter(_Stdout(1, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(file, encoding, line_buffering=os.isatty(1))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without × or → is no reason to fail


def _descriptor(stream: Any) -> int | None:
    """The descriptor that a stream writes to; None for a stream that was closed, -1 for one without any."""
    if stream is None:
        return None
    try:
        return int(stream.fileno())
    except OSError:  # in memory
        return -1


def drop_stdout() -> None:
    """Sends what is still in the buffer nowhere: Python would fail once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def unprinted(error: Unprinted, *, done: bool) -> int:
    """Says on stderr that the outcome could not be printed; returns the exit code.

    Args:
        done: whether the command has made or changed something, which stays.
    """
    why = f"stdout: {error.strerror}"
    try:
        if done:
            click.echo(f"done, but the outcome could not be printed ({why})", err=True)
            return 0
        print_error(StorageError(why, "send the output somewhere else"), False)
    except OSError:  # stderr is full too: the exit code is all that can be said
        return 0 if done else StorageError.exit_code
    return StorageError.exit_code
