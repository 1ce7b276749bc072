"""The accuracies that the study of signatures found: means, intervals over seeds, shares of gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

TOLD = 0.02
"""The share of a gap that is closed is told where the gap is at least so large."""
CLEAN = ", clean"
Found = Mapping[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return fmean(values), float("inf")
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values), half


class Outcome:
    """Accuracies on test images of one network."""

    def __init__(self, found: Found) -> None:
        self._tests: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]] = found["tests"]
        self.names = list(self._tests)
        self.seeds = len(self._tests[self.names[0]])

    def seedwise(self, domain: str, method: str, names: Sequence[str]) -> list[float]:
        """Of each seed, the mean over corruptions."""
        return [fmean(self._tests[name][seed][domain][method] for name in names) for seed in range(self.seeds)]

    def mean(self, domain: str, method: str, names: Sequence[str]) -> float:
        """Over seeds and corruptions."""
        return fmean(self.seedwise(domain, method, names))

    def has(self, domain: str, method: str) -> bool:
        """Whether it was scored."""
        return method in self._tests[self.names[0]][0][domain]

    def difference(self, domain: str, one: str, two: str, names: Sequence[str]) -> tuple[float, float]:
        """Mean of one − two with its interval, seed by seed."""
        pairs = zip(self.seedwise(domain, one, names), self.seedwise(domain, two, names), strict=True)
        return interval([a - b for a, b in pairs])

    def closed(self, domain: str, method: str, names: Sequence[str]) -> float | None:
        """The share of the gap between standard and trained that is closed; None where there is hardly one."""
        low, high = (self.mean(domain, m, names) for m in ("standard", "trained"))
        return (self.mean(domain, method, names) - low) / (high - low) if high - low >= TOLD else None


def percent(mean: float, half: float) -> str:
    return f"{mean * 100:.1f}" + (f" ± {half * 100:.1f}" if half != float("inf") else "")


def points(mean: float, half: float) -> str:
    return f"{mean * 100:+.1f}" + (f" ± {half * 100:.1f}" if half != float("inf") else "")


def share_of_gap(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
