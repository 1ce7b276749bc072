"""The fuzzer's own parts: seeds give the same bytes again, every mutation changes something, findings are found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

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


def test_files_stay_whole_with_other_tensors_in_them(tmp_path: Path) -> None:
    """Of a third of the inputs only the tensors are others, so that what reads them gets behind the header."""
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}
    changes = set()
    for seed in range(400):
        (tmp_path / "x").write_bytes(of_safetensors(save(tensors), Random(seed)))
        try:
            found = load_file(tmp_path / "x")
        except SafetensorError:
            continue
        changes |= {"name"} if found.keys() - tensors.keys() else set()
        changes |= {"gone"} if len(found) < len(tensors) else set()
        for name in found.keys() & tensors.keys():
            changes |= {"shape"} if found[name].shape != tensors[name].shape else set()
            changes |= {"dtype"} if found[name].dtype != tensors[name].dtype else set()
            changes |= {"NaN"} if found[name].is_floating_point() and found[name].isnan().any() else set()
    assert changes == {"name", "gone", "shape", "dtype", "NaN"}


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
