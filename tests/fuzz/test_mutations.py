"""The fuzzer's own parts: seeds give the same bytes again, every mutation changes something, findings are found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save

from tests.fuzz import trial
from tests.fuzz.kinds import Kind, Reader
from tests.fuzz.mutations import Mutation, of_bytes, of_json, of_lines, of_safetensors, of_yaml
from weightlab.errors import MalformedFileError

TREE = json.dumps({"a": [1, {"b": "c"}], "d": json.dumps({"inner": [1, 2]}), "e": 0.5}).encode()
SAMPLES: dict[Mutation, bytes] = {of_bytes: TREE, of_json: TREE, of_lines: TREE + b"\n" + TREE, of_yaml: TREE}
SAMPLES[of_safetensors] = save({"w": torch.ones(2, 3)}, {"k": TREE.decode()})


@pytest.mark.parametrize("mutation", SAMPLES)
def test_a_seed_gives_the_same_again(mutation: Mutation) -> None:
    data = SAMPLES[mutation]
    made = [mutation(data, Random(seed)) for seed in range(200)]
    assert made == [mutation(data, Random(seed)) for seed in range(200)]
    assert sum(changed != data for changed in made) > 180 and len(set(made)) > 150


def test_keys_come_twice_and_texts_in_texts_are_changed() -> None:
    made = [of_json(TREE, Random(seed)) for seed in range(2000)]
    assert any(changed.count(b'"e":') > 1 for changed in made)
    assert any(b'\\"inner\\"' in changed and b'\\"inner\\": [1, 2]' not in changed for changed in made)


def _kind(reader: Reader) -> Kind:
    def make(folder: Path) -> None:
        (folder / "x").write_bytes(TREE)

    return Kind("made up", make, {"x": of_bytes}, {"read": reader})


def _fails(error: BaseException) -> Reader:
    def read(folder: Path) -> None:
        if (folder / "x").read_bytes() != TREE:
            raise error

    return read


def _outcome(reader: Reader) -> trial.Outcome:
    fuzzer = trial.Fuzzer()
    try:
        return next(o for seed in range(20) if (o := fuzzer.trial(_kind(reader), seed)).result != "accepted")
    finally:
        fuzzer.close()


def test_errors_of_our_own_are_outcomes_and_others_are_findings() -> None:
    assert _outcome(_fails(MalformedFileError("x", "y"))).result == "MalformedFileError"
    found = _outcome(_fails(KeyError("k")))
    assert found.result == "" and found.finding.startswith("KeyError at the fuzzer")


def test_what_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        if (folder / "x").read_bytes() != TREE:
            time.sleep(5)

    monkeypatch.setattr(trial, "SECONDS", 0.05)
    assert _outcome(read).finding.startswith("more than 0.05 s")


def test_what_takes_much_memory_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        if (folder / "x").read_bytes() != TREE:
            torch.ones(trial._peak() // 4 + 2**24)  # more than the process ever had

    monkeypatch.setattr(trial, "MEMORY", 2**22)
    monkeypatch.setattr(trial, "_virtual", lambda: 2**46)
    assert _outcome(read).finding.endswith("MB more memory")
