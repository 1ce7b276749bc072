"""Holding back signals while a change is undone or finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back until the block has ended, then lets them through.

    Python runs handlers in the main thread only; in another thread there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {s: signal.getsignal(s) for s in _HELD}
    ours = {s: h for s, h in before.items() if h is not None}  # None: set by other code than Python's
    for number in ours:
        signal.signal(number, lambda n, _: held.append(n))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    for arrived in held:
        signal.raise_signal(arrived)
