"""Every error that weightlab raises on purpose: one class per cause, each with its exit code.

A message has three parts: what is wrong (one line), the offenders (all of them, a line each) and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class WeightlabError(Exception):
    """Base of all deliberate errors.

    Args:
        message: what is wrong, one line.
        remedy: what the user can do about it, one line.
        offenders: every tensor, file or key concerned, a line each.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", offenders: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = _shown(message)
        self.remedy = _shown(remedy)
        self.offenders = tuple(map(_shown, offenders))

    def __str__(self) -> str:
        lines = [self.message, *(f"  {offender}" for offender in self.offenders)]
        return "\n".join([*lines, self.remedy] if self.remedy else lines)


def _shown(text: str) -> str:
    """A text that a terminal may get: names in files can hold what moves its cursor, and halves of characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class UsageError(WeightlabError):
    """The request itself makes no sense: an unknown name, a scale that is no number."""

    exit_code = 2


class InputError(WeightlabError):
    """An input is missing or cannot be used."""

    exit_code = 3


class MissingInputError(InputError):
    """A path does not exist, or holds no checkpoint or patch."""


class MalformedFileError(InputError):
    """A file breaks the rules of its own format."""


class UnsafePickleError(InputError):
    """A pickle wants to run code when it is opened."""


class UnsupportedFormatError(InputError):
    """A format that is recognised and deliberately not read."""


class UnknownNetworkError(InputError):
    """The network of a checkpoint is needed and not known: no class for it, code of its own, sizes that cannot be."""


class NonFiniteError(InputError):
    """NaN or infinity in an input."""


class MisfitError(WeightlabError):
    """Inputs are fine by themselves and do not fit each other."""

    exit_code = 4


class NamesMismatchError(MisfitError):
    """Tensor names, shapes or dtypes of two inputs differ."""


class WrongBaseError(MisfitError):
    """An exact patch meets a tensor that is not the one it was taken from."""


class RangeError(MisfitError):
    """A result does not fit the storage dtype of its tensor."""


class NotPatchableError(MisfitError):
    """The operation is not possible on this kind of tensor or file."""


class StackError(MisfitError):
    """A patch is on already, is not on, or cannot join those that are."""


class IntegrityError(WeightlabError):
    """Bytes are not what their digest says, or a write was interrupted."""

    exit_code = 5


class BusyError(WeightlabError):
    """Another process holds the checkpoint."""

    exit_code = 6


class StorageError(WeightlabError):
    """The disk is full, or the file system refuses."""

    exit_code = 7


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; a BaseException so that no handler of errors swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number
