"""The record of a benchmark: grows, is read again, and asks anew what has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _record import Record


def test_what_is_known_is_not_found_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "results" / "r.json", []

    def find() -> dict[str, Any]:
        asked.append(1)
        return {"pair": (1, 2), "of": {3: len(asked)}}

    first = Record(path, "numpy").once("vgg", "key", find)
    assert first == {"pair": [1, 2], "of": {"3": 1}}  # as it will be read
    assert Record(path, "numpy").once("vgg", "key", find) == first and len(asked) == 1
    assert Record(path, "numpy").once("vgg", "other key", find)["of"] == {"3": 2}
    record = Record(path, "numpy")
    record.once("vit", "key", find)
    assert set(json.loads(path.read_text())["entries"]) == {"vgg", "vit"}
    assert record.conditions()["same"] and record.conditions()["versions"]["numpy"]
    record.entries["vit"]["versions"]["numpy"] = "0"
    assert not record.conditions()["same"]


def test_a_finding_that_fails_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Record(path).once("one", "k", lambda: 1)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        Record(path).once("two", "k", lambda: 1 / 0)
    assert path.read_bytes() == before


def test_without_a_file(tmp_path: Path) -> None:
    record = Record(None)
    assert record.once("one", "k", lambda: 1) == record.once("one", "k", lambda: 2) == 1


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="no record"):
        Record(path)
