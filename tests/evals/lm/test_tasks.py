"""The index of tasks that is read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")

import lm_eval.evaluator
import lm_eval.tasks
from weightlab_evals.lm.tasks import index_kept


def write_task(folder: Path, name: str) -> Path:
    folder.mkdir()
    task = {"task": name, "dataset_path": "json", "output_type": "multiple_choice", "doc_to_text": "q"}
    (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


def test_the_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_task(tmp_path / "a", "one"), write_task(tmp_path / "b", "two")
    first, read = lm_eval.tasks.TaskManager, []
    build = lm_eval.tasks.manager.TaskIndex.build

    def counted(paths: Any, **options: Any) -> Any:
        read.append(list(paths))
        return build(paths, **options)

    monkeypatch.setattr(lm_eval.tasks.manager.TaskIndex, "build", staticmethod(counted))
    with index_kept():
        for manager in (lm_eval.tasks.TaskManager, lm_eval.evaluator.TaskManager):
            made = manager(include_path=str(one), include_defaults=False)
            assert made.all_tasks == ["one"] and isinstance(made, first)
        assert len(read) == 1
        # Other arguments are another index.
        assert lm_eval.tasks.TaskManager(include_path=str(two), include_defaults=False).all_tasks == ["two"]
        other: Any = lm_eval.tasks.TaskManager(
            include_path=str(one), include_defaults=False, metadata={"pretrained": "m"}
        )
        assert other.all_tasks == ["one"] and other.metadata == {"pretrained": "m"} and len(read) == 3
        with pytest.raises(ZeroDivisionError), index_kept():
            1 / 0  # noqa: B018
    assert lm_eval.tasks.TaskManager is lm_eval.evaluator.TaskManager is first
    lm_eval.tasks.TaskManager(include_path=str(one), include_defaults=False)
    assert len(read) == 4
