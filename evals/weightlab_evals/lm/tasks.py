"""lm_eval's index of tasks, read once for many runs in one process.

Making one reads the nearly 14,000 YAML files that lm_eval brings, which takes longer than to score a small task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def index_kept() -> Iterator[None]:
    """For the length of a block, lm_eval gets one and the same index of tasks for the same arguments.

    An index names tasks and their files and is only looked up; tasks themselves are made anew for every run.
    """
    import lm_eval.evaluator
    import lm_eval.tasks

    first: Any = lm_eval.tasks.TaskManager
    known: dict[str, dict[str, Any]] = {}

    class Kept(first):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            key = repr((args, sorted(kwargs.items())))
            if key not in known:
                super().__init__(*args, **kwargs)
                known[key] = dict(self.__dict__)
            self.__dict__.update(known[key])

    places: tuple[Any, ...] = (lm_eval.tasks, lm_eval.evaluator)
    for module in places:
        module.TaskManager = Kept
    try:
        yield
    finally:
        for module in places:
            module.TaskManager = first
