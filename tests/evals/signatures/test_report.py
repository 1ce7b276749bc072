"""The report of the benchmark: means, intervals and shares, on numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from _signature_outcome import Outcome, interval
from _signature_report import METHODS, report
from weightlab_evals.signatures.patches import FAMILIES

NAMES = [name for family in FAMILIES.values() for name in family]
BY_METHOD = {"standard": 0.5, "trained": 0.9, "signature": 0.8, "unprojected": 0.7, "random": 0.5}


def network(scale: float = 1.0) -> dict[str, Any]:
    """Three seeds; the same for every corruption but fog, which costs a standard model nothing."""

    def row(seed: int, name: str) -> dict[str, float]:
        values = {m: BY_METHOD.get(m, 0.6) * scale + 0.01 * seed for m in METHODS if m != "statistics"}
        values["random"] -= 0.02 * seed  # so its distance from the others differs between seeds
        if name == "fog":
            values = dict.fromkeys(values, 0.9)
        return values | {f"{m}, clean": 0.95 for m in values}

    def every(seed: int, name: str) -> dict[str, dict[str, float]]:
        found = row(seed, name)
        return {"A": found, "B": found, "A 5-9": found, "further": found, "A by alpha": found, "B by alpha": found}

    composed = {"corruptions": ["snow", "frost"], "share": 0.5, "accuracy": {"clean": 0.9, "snow": 0.7, "frost": 0.8}}
    alike = {
        "ranks": {"B in A": {"snow": 1, "frost": 3}},
        "cosines": {"A and A": {"same": 1.0, "different": 0.2}, "A and B": {"same": 0.5, "different": 0.1}},
        "depths": {"features.0": 0.3, "features.2": 0.1},
    }
    return {
        "controls": [{"A": row(seed, "snow"), "B": row(seed, "snow")} for seed in range(3)],
        "choice": {"form": {"depth": 4, "norm": "keep"}, "alphas": {"signature": {"snow": 0.5, "fog": 0.75}}},
        "forms": [{"depth": 4, "norm": "keep", "corrupted": 0.8}],
        "tests": {name: [every(seed, name) for seed in range(3)] for name in NAMES},
        "composed": [[composed]] * 3,
        "alike": [alike] * 3,
        "other_start": [{"ranks": {"snow": 2, "frost": 2}, "cosines": {"same": 0.01, "different": 0.0}}] * 3,
    }


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0]) == (1.0, math.inf)


def test_shares_and_differences() -> None:
    tests = Outcome(network())
    assert tests.closed("A", "signature", ["snow"]) == pytest.approx(0.75)
    assert tests.closed("A", "signature", ["fog"]) is None  # no gap to close
    mean, half = tests.difference("A", "signature", "unprojected", ["snow"])
    assert mean == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-12)  # seed by seed it is always the same
    mean, half = tests.difference("A", "signature", "random", ["snow"])
    assert mean == pytest.approx(0.32) and half == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)


def test_everything_is_told() -> None:
    result: dict[str, Any] = {
        "versions": {"python": "3", "torch": "2", "corrupt-tta": "0"},
        "machine": {"processor": "cpu", "cores": 2, "memory_bytes": 2**30, "kernel": "6", "filesystem": "ext4"},
        "seeds": [10, 11, 12],
        "networks": {"vgg": network(), "vit": network(0.9)},
        "sizes": {"VGG-16": {"full": 1000, **{e: {"4": 100} for e in ("fp32", "8 bits", "4 bits", "2 bits")}}},
        "comes_off": {"vgg": {"first SHA-256 again": True}},
    }
    text = report(result)
    for expected in (
        "K = 4",
        "| frost | ",
        "75%",
        "10.0",
        "snow + frost at α/2 75.0%",
        "B in A 50% right, mean rank 2.0",
    ):
        assert expected in text, expected
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + len(METHODS) - 1 + 1) + 2 + len(NAMES)  # nobody scored `statistics`
    result["comes_off"]["vgg"]["first SHA-256 again"] = False
    assert "Not so: vgg: first SHA-256 again" in report(result)
