"""The report of the benchmark of transfer, on numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from _transfer_report import arrived, first_there, kept, report
from weightlab_evals.transfer.study import CONTROLS

LADDER = (1.0, 2.0, 4.0)


def seed(shift: float = 0.0) -> dict[str, Any]:
    """v2 + Δ closes three quarters of the gap and keeps half of the gain."""
    right = {"v1": 0.5, "FT(v1)": 0.9, "v2": 0.5, "v2 + Δ": 0.8, "v2 + λΔ": 0.85, "FT(v2)": 0.9}
    nats = {"v1": 4.0, "FT(v1)": 4.1, "v2": 3.0, "v2 + Δ": 3.5, "v2 + λΔ": 3.6, "FT(v2)": 3.2}
    forecast = {"layer": "all", "lost": 0.0, "ratio": 2.0, "cosine": 0.9, "distance": 0.1, "change": 0.05, "along": 0.0}
    rung = {**forecast, "right": 0.5, "right with delta": 0.8, "right when tuned": 0.9}
    control = {**forecast, "lost": 0.9, "perplexity": 20.0, "right": 0.5, "right with delta": 0.5}
    return {
        "scale": {"scale": 1.25, "tried": {}},
        "table": {name: {"right": right[name] + shift, "perplexity": math.exp(nats[name])} for name in right},
        "ladder": [{"mark": mark, **rung} for mark in LADDER],
        "controls": dict.fromkeys(CONTROLS, control),
        "barrier": {"barrier": 0.1, "relative": 0.05, "losses": [], "scales": [], "base_loss": 1.0},
        "steps": {"v2": {"0": 0.5, "8": 0.7, "16": 0.9}, "v2 + Δ": {"0": 0.895, "8": 0.895, "16": 0.95}},
    }


def test_shares() -> None:
    assert arrived(seed()) == pytest.approx(0.75)
    assert kept(seed()) == pytest.approx(0.5)


def test_step_0_does_not_count() -> None:
    assert first_there(seed()) == {"v2": 16, "v2 + Δ": 8}
    never = seed() | {"steps": {"v2": {"0": 0.5, "16": 0.9}, "v2 + Δ": {"0": 0.95, "16": 0.8}}}
    assert first_there(never) == {"v2": 16, "v2 + Δ": None}


def test_what_is_told() -> None:
    rows = [{"questions": 50, "memory": 40.0, "written": 200.0, "writing": 5.0, "same": True}]
    machine = {"processor": "cpu", "cores": 2, "memory_bytes": 2**30, "kernel": "6", "filesystem": "ext4"}
    versions = {"python": "3", "torch": "2", "transformers": "5", "lm_eval": "0.4"}
    models = {"smollm2": [seed(), seed(0.02)], "minilm": [seed()]}
    told: dict[str, Any] = {"machine": machine, "versions": versions, "models": models}
    text = report({**told, "timing": {"start": 10.0, "rows": rows}, "timed on": machine})
    assert "| **v2 + Δ** | 81.0 ± 12.7 | 33.1 ± 0 | 80.0 | 33.1 |" in text
    assert "| 75.0 ± 0.0 % | 50.0 ± 0.0 % | 75.0 % | 50.0 % |" in text
    assert "SmolLM2-135M: 1.25, 1.25; MiniLM: 1.25." in text
    assert text.count("| SmolLM2-135M, ") == 2 + len(LADDER) + len(CONTROLS) + 2
    assert text.count("| unrelated |") == 2 * len(CONTROLS) and text.count("| near |") == 2 * len(LADDER)
    assert "| 50 | 40 | 200 | 5 | 0.20 | 0.30 |" in text and "same scores" in text
    # Without timing, and where the scores differ.
    assert "Ten scales" not in report(told)
    timing = {"start": 10.0, "rows": [rows[0] | {"same": False}]}
    other = report({**told, "timing": timing, "timed on": machine, "same": False})
    assert "other machines" in other and "other machines" not in text
    assert "The scores differ." in other
