"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from weightlab_cli.options import memory_size

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from weightlab.stream.executor import Resources


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 * 2**20),
        ("1G", 2**30),
        ("1.5G", 3 * 2**29),
        ("2 GB", 2**31),
        ("700MiB", 700 * 2**20),
        ("64k", 2**16),
        ("1T", 2**40),
        ("400000000", 400_000_000),
    ],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "much", "-1G", "1,5G", "1e9", "inf", "1P", "1 G B"])
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="512M"):
        memory_size(text)


def test_wrong_memory_is_a_usage_error(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("inspect", "base", "--memory", "much")
    assert ended.code == 2 and "'much' is no amount of memory" in ended.err
    ended = weightlab("inspect", "base", "--memory", "5M")
    assert ended.code == 2 and "too small" in ended.err and "give at least" in ended.err


def test_resources_arrive_at_the_library(weightlab: Weightlab, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Resources] = []
    original = wl.inspect

    def inspect(*arguments: Any, resources: Resources, **others: Any) -> Any:
        seen.append(resources)
        return original(*arguments, resources=resources, **others)

    monkeypatch.setattr(wl, "inspect", inspect)
    assert weightlab("inspect", "base").code == 0
    assert weightlab("inspect", "base", "--threads", "3", "--memory", "1G", "--device", "cpu").code == 0
    assert [(r.threads, r.memory, r.device) for r in seen] == [(None, None, "cpu"), (3, 2**30, "cpu")]


@pytest.mark.parametrize("words", [("--threads", "0"), ("--threads", "x"), ("--wait", "-1"), ("--links", "follow")])
def test_values_that_make_no_sense(weightlab: Weightlab, patches: Path, words: tuple[str, ...]) -> None:
    before = content(patches)
    ended = weightlab("apply", "base", "exact.safetensors", "--in-place", *words)
    assert ended.code == 2 and words[0] in ended.err
    assert content(patches) == before


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(weightlab: Weightlab, patches: Path, device: str) -> None:
    before = content(patches)
    ended = weightlab("apply", "base", "exact.safetensors", "--in-place", "--device", device)
    assert ended.code == 2
    wrong, remedy = ended.err.splitlines()
    assert wrong.startswith(f"error: --device {device} cannot be used: ") and "leave it out" in remedy
    assert content(patches) == before


@pytest.mark.parametrize("verb", ["diff base tuned", "inspect base", "verify base", "status base"])
def test_quiet_and_json(weightlab: Weightlab, patches: Path, verb: str) -> None:
    words = verb.split()
    shown = weightlab(*words)
    assert shown.code == 0 and shown.out and not shown.err
    assert weightlab(*words, "--quiet").out == ""
    assert weightlab(*words, "-q").err == ""
    assert isinstance(weightlab(*words, "--json").json, dict)
    assert weightlab(*words, "--json", "--quiet").json == weightlab(*words, "--json").json


def test_quiet_does_not_hide_errors(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("inspect", "nothing", "--quiet")
    assert ended.code == 3 and ended.err.startswith("error: nothing: ")
