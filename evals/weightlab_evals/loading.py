"""Loading networks of transformers from a folder that may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightlab.networks.configuration import read_configuration
from weightlab.networks.plausible import within_bounds
from weightlab.ops.operands import reading


@contextmanager
def looked_at(folder: str | Path) -> Iterator[None]:
    """The block makes a network by what a folder says, which is looked at first; what it makes is counted.

    Raises:
        UnknownNetworkError: it asks for what its tensors do not make plausible, or has code of its own.
        MissingInputError, MalformedFileError: weights or configuration are not there, or damaged.
    """
    with reading(folder) as source:
        specs = dict(source.specs)
    read_configuration(Path(folder), specs)
    with within_bounds(specs):
        yield
