"""What is wrong with a difference, gathered over all tensors and raised once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from weightlab.errors import NonFiniteError, RangeError


class Faults:
    """NaN, infinities and overflows met by any thread."""

    def __init__(self, *, allow_nonfinite: bool) -> None:
        self._allow = allow_nonfinite
        self._nonfinite: set[str] = set()
        self._range: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._nonfinite or self._range)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps a fault of the block for later; other errors pass."""
        try:
            yield
        except NonFiniteError as error:
            self._nonfinite.update(error.offenders)
        except RangeError as error:
            self._range.update(error.offenders)

    def raise_any(self) -> None:
        """Raises:
        NonFiniteError, RangeError: lists every tensor concerned.
        """
        if self._nonfinite:
            raise NonFiniteError(
                f"NaN or infinity in {len(self._nonfinite)} tensors",
                "store these dense or exact, or exclude them"
                if self._allow
                else "mend them, exclude them, or pass --allow-nonfinite",
                sorted(self._nonfinite),
            )
        if self._range:
            raise RangeError(
                f"{len(self._range)} deltas are too large for how they are stored",
                "store these as dense:fp32, dense:fp64 or exact, or exclude them",
                sorted(self._range),
            )
