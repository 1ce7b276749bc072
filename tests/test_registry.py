"""Plug-ins by file name and by entry point."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import weightlab.registry
from weightlab.errors import UsageError
from weightlab.registry import Registry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `things` with the plug-ins `one` and `two`."""
    place = tmp_path / "things"
    place.mkdir()
    (place / "__init__.py").write_text("")
    (place / "one.py").write_text("THING = 'first'\n")
    (place / "two.py").write_text("THING = 'second'\n")
    (place / "_helper.py").write_text("raise RuntimeError('imported')\n")
    (place / "broken.py").write_text("OTHER = 1\n")
    (place / "sub").mkdir()
    (place / "sub" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "things"]:
        monkeypatch.delitem(sys.modules, name)
    return place


def things() -> Registry[str]:
    return Registry("things", "THING", "thing")


def installed(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = [EntryPoint(name, value, "things") for name, value in points]
    monkeypatch.setattr(weightlab.registry, "entry_points", lambda group: found if group == "things" else [])


def test_files_are_plug_ins_and_are_imported_when_asked_for(folder: Path) -> None:
    registry = things()
    assert registry.names() == ["broken", "one", "two"]
    assert "things.one" not in sys.modules
    assert registry.get("one") == "first" and "things.two" not in sys.modules
    with pytest.raises(AttributeError, match="THING"):
        registry.get("broken")


def test_an_unknown_name_suggests_and_lists(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown thing 'tow'") as failed:
        things().get("tow")
    assert failed.value.remedy == "did you mean 'two'? choose from broken, one, two"
    with pytest.raises(UsageError) as failed:
        things().get("xyzzy")
    assert failed.value.remedy.startswith("choose from")


def test_other_packages_add_by_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ("three", "string:digits"))
    assert things().names() == ["broken", "one", "three", "two"] and things().get("three") == "0123456789"


@pytest.mark.parametrize("points", [[("one", "string:digits")], [("x", "string:digits"), ("x", "string:hexdigits")]])
def test_a_name_that_is_taken_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: list[tuple[str, str]]
) -> None:
    installed(monkeypatch, *points)
    with pytest.raises(UsageError, match="two plug-ins claim") as failed:
        things().names()
    assert "uninstall" in failed.value.remedy


def test_the_projects_own() -> None:
    from weightlab.encodings import ENCODINGS
    from weightlab.sources import SOURCES

    assert ENCODINGS.names() == ["dense", "exact", "low_rank", "quantized", "sign", "sparse"]
    assert SOURCES.names() == ["gguf", "local", "parts", "pickled"]
