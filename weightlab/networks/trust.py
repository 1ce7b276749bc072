"""Whether code that comes with a model may be run. It may not, unless the user says so.

Every call of transformers gets `trust_remote_code=trust_remote_code()`: without a value it would ask on the terminal,
and take the answer from a pipe too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

OWN_CODE_REMEDY = "read that code first; if you trust it, say --trust-remote-code"

_trusted: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def trust_remote_code() -> bool:
    """Whether the user said that code of models may be run; in a thread of one's own the answer is no."""
    return _trusted.get()


@contextmanager
def trusting_remote_code() -> Iterator[None]:
    """For the length of a block, networks and tokenizers may be made by the Python files in a model's folder."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def remedy_for(error: Exception, otherwise: str) -> str:
    """What to do about an error of transformers: of those that ask for trust, what weightlab calls it."""
    return OWN_CODE_REMEDY if "trust_remote_code" in str(error) else otherwise
