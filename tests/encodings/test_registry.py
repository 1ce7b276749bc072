"""The folder of encodings as plug-ins: what each offers, how unknown ones are told, how another package adds one."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

import pytest

from weightlab.encodings import ENCODINGS, Encoding
from weightlab.errors import UsageError
from weightlab.registry import Registry
from weightlab.tensors.spec import TensorSpec

NAMES = ["dense", "exact", "low_rank", "quantized", "sign", "sparse"]


def fresh() -> Registry[Encoding]:
    return Registry("weightlab.encodings", "ENCODING", "encoding")


def test_the_folder_is_the_list() -> None:
    assert ENCODINGS.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_its_own_example_is_understood(name: str) -> None:
    encoding = ENCODINGS.get(name)
    for word in encoding.example.split("(")[0].split(" or "):
        first, *arguments = word.strip().split(":")
        assert first == name
        parameters = encoding.parse(arguments)
        assert isinstance(encoding.accepts(TensorSpec("w", "F32", (64, 64)), parameters), bool)


@pytest.mark.parametrize("name", NAMES)
def test_only_exact_is_lossless(name: str) -> None:
    assert ENCODINGS.get(name).lossless is (name == "exact")


@pytest.mark.parametrize(("wrong", "near"), [("low_rnak", "low_rank"), ("quantised", "quantized"), ("Exact", "exact")])
def test_an_unknown_name_gets_a_suggestion_and_the_list(wrong: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        ENCODINGS.get(wrong)
    assert f"did you mean {near!r}? choose from {', '.join(NAMES)}" in str(caught.value)


def test_an_unlike_name_gets_the_list_alone() -> None:
    with pytest.raises(UsageError) as caught:
        ENCODINGS.get("")
    assert caught.value.remedy == f"choose from {', '.join(NAMES)}"


def entry_points(*points: EntryPoint) -> object:
    return lambda *, group: [point for point in points if point.group == group]


def test_another_package_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "weightlab.encodings.sign:ENCODING", "weightlab.encodings")
    monkeypatch.setattr("weightlab.registry.entry_points", entry_points(point))
    registry = fresh()
    assert registry.names() == sorted([*NAMES, "mine"])
    assert registry.get("mine") is ENCODINGS.get("sign")


@pytest.mark.parametrize("names", [["dense"], ["mine", "mine"]])
def test_a_name_that_is_taken_is_refused(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(n, f"package{i}:ENCODING", "weightlab.encodings") for i, n in enumerate(names)]
    monkeypatch.setattr("weightlab.registry.entry_points", entry_points(*points))
    with pytest.raises(UsageError, match="two plug-ins claim"):
        fresh().names()


def test_the_package_registers_no_entry_point_of_its_own() -> None:
    assert not list(importlib.metadata.entry_points(group="weightlab.encodings"))
