"""Command lines run as in the tests of the commands."""

from tests.cli.conftest import weightlab

__all__ = ["weightlab"]
