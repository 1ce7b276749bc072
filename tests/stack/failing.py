"""System calls that fail when a test says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

WRITES = ("pwrite", "copy_file_range")
OTHERS = ("fsync", "fdatasync", "rename", "mkdir", "link", "unlink", "rmdir")


@dataclass
class Calls:
    """How many were made, and how many of them failed."""

    made: int = 0
    failed: int = 0


@contextmanager
def failing(names: Sequence[str], error: int, at: int, *, ever_after: bool = False) -> Iterator[Calls]:
    """Lets the call number `at` (from 0) of these functions of `os` fail, alone or with all that come after it."""
    calls = Calls()

    def wrap(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            number = calls.made
            calls.made += 1
            if number == at or (ever_after and number > at):
                calls.failed += 1
                raise OSError(error, os.strerror(error))
            return real(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, wrap(name))
        yield calls
