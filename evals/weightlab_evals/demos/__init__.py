"""Demonstrations, each on real data: one file a demonstration, each with an object `DEMO`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from weightlab.errors import WeightlabError
from weightlab.registry import Registry

Run = Callable[[Sequence[str]], int]
"""Runs one command line of weightlab and returns its exit code."""
Say = Callable[[str], None]


class Demo(Protocol):
    """Goes through something that a user does; every command is printed before it is run."""

    def check(self, data: Path) -> None:
        """Raises an error of weightlab where something is lacking, with what to do.

        Args:
            data: the folder with downloaded wheels, as an absolute path.
        """

    def run(self, data: Path, picture: Path, steps: Steps) -> None:
        """Runs it in the current folder, which is empty.

        Args:
            picture: where a picture goes, as an absolute path.

        Raises:
            WeightlabError: a command failed, or bytes are not what they should be.
        """


class Steps:
    """Prints and runs commands."""

    def __init__(self, run: Run, say: Say) -> None:
        self._run, self._say = run, say

    def say(self, text: str) -> None:
        """Prints what comes next, or what was seen."""
        self._say(f"\n# {text}")

    def __call__(self, *words: str) -> None:
        """Prints a command line and runs it.

        Raises:
            WeightlabError: it failed.
        """
        self._say(f"\n$ weightlab {' '.join(words)}")
        code = self._run(words)
        if code:
            raise WeightlabError(f"that command ended with {code}, and should not have")


DEMOS: Registry[Demo] = Registry("weightlab_evals.demos", "DEMO", "demonstration")
