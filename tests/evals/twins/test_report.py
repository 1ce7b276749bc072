"""The report of the study of twins: its claims are computed as they are worded."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is in the extra lm")

from _twin_report import closed, normalised, report
from weightlab_evals.twins.study import COMPRESS, ROUTERS, SCALES
from weightlab_evals.twins.texts import TASKS, UNSEEN

MACHINE = {"processor": "cpu", "cores": 2, "memory_bytes": 2**30, "kernel": "6", "filesystem": "ext4"}


def row(score: float, unseen: bool = True) -> dict[str, float]:
    return dict.fromkeys(TASKS, score) | ({UNSEEN: 0.5} if unseen else {})


def seed(more: float = 0.0) -> dict[str, Any]:
    """Experts at 80 %, the best static merge at 40, twins at 72."""
    static = {name: {"scale": 0.5, "tried": {}, "row": row(0.2)} for name in ("averaging", *SCALES)}
    static["ties:0.2"]["row"] = row(0.4)
    kinds = ["oracle", *(f"{router}, {head} head" for router in ROUTERS for head in ("true", "routed"))]
    twins: dict[str, Any] = {}
    for compress in COMPRESS:
        low = compress.startswith("low_rank")
        rows = {kind: row(0.72 + more) for kind in kinds if low or not kind.startswith("response")}
        twins[compress] = {"bytes": {"shared": 90_000_000, **dict.fromkeys(TASKS, 5_000_000)}, "rows": rows}
    without = {
        name: {"rank": rank, "bytes": dict.fromkeys(TASKS, size), "rows": {"trained, routed head": row(score)}}
        for name, rank, size, score in (("equal rank", 16, 5_000_000, 0.68), ("equal bytes", 77, 23_000_000, 0.72))
    }
    return {
        "rows": {
            "experts": row(0.8, unseen=False),
            "base": row(0.2),
            "multitask": row(0.8),
            "full experts, hard routing": row(0.76),
            "LoRA experts": row(0.7, unseen=False),
        },
        "static": static,
        "cross": dict.fromkeys(TASKS, 0.3),
        "routing": {r: {n: {t: float(t == n) for t in TASKS} for n in (*TASKS, UNSEEN)} for r in ROUTERS},
        "twins": twins,
        "without shared part": without,
        "LoRA bytes": 7_000_000,
        "LoRA twin": {"bytes": {"shared": 9_000_000}, "rows": {"trained, routed head": row(0.6)}},
    }


def told(seeds: list[dict[str, Any]], **more: Any) -> str:
    versions = dict.fromkeys(("python", "torch", "transformers", "peft"), "1")
    return report({"machine": MACHINE, "versions": versions, "same": True, "seeds": seeds, **more})


def test_shares() -> None:
    one = seed()
    assert normalised(one, row(0.4)) == pytest.approx(0.5)
    assert closed(one, row(0.72)) == pytest.approx(0.8) and closed(one, row(0.3)) == pytest.approx(-0.25)


def test_what_is_told() -> None:
    text = told([seed(), seed(0.04)])
    assert "50.0 ± 0.0 % of the experts: there is headroom" in text
    assert "closes 85.0 ± 63.5 % at low_rank:16 (each part 5.6% of a model)" in text
    assert "+7.5 ± 31.8 points against the same rank; +2.5 ± 31.8 points against the same bytes" in text
    assert "| **twin, low_rank:16** | 74.0 | 74.0 | 74.0 | 74.0 | 74.0 | 92.5 ± 31.8 | 50.0 | 115 |" in text
    assert "| θt − θ0 itself, low_rank:77 (equal bytes), routed | 72.0 |" in text
    assert "| 90.0 ± 0.0 | 50.0 | 115 |" in text
    assert "| five experts | 80.0 | 80.0 | 80.0 | 80.0 | 80.0 | 100.0 ± 0.0 | – | 450 |" in text
    assert "| sparse:0.1 | 5.0 |" in text and "| – | – |" in text
    assert "| LoRA experts, rank 8 | 70.0 |" in text and "| 87.5 ± 0.0 | – | 7 |" in text
    assert "TIES, density 0.2 0.5, 0.5" in text and "Products by each expert alone: topics 30.0" in text
    assert "**Time.**" not in text


def test_no_headroom() -> None:
    one = seed()
    one["static"]["averaging"]["row"] = row(0.79)
    assert "**no headroom**" in told([one])


def test_times() -> None:
    ways = {"the shared model alone": 2.0, "twin, with its router": 5.0, "merging for every sample, from files": 80.0}
    split = {"seconds": 12.0, "peak": 1.5e9, "anonymous": 1e9}
    one = {"milliseconds": ways, "furthest": 1e-6, "split": split, "bytes": {"base": 5e8, "twin": 1}, "parameters": 1}
    text = told([], timing={"RoBERTa": one}, **{"timed on": MACHINE})
    assert "| merging for every sample, from files | 80.0 (40.00) |" in text
    assert "16.0 times as fast as merging for every sample, from files" in text and "12 s and 1.50 GB" in text
