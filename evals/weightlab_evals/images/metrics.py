"""Accuracy with its interval, and the mean corruption error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Images, how many were right, the share, and its 95 % interval (Wilson 1927)."""

    images: int
    correct: int
    accuracy: float
    low: float
    high: float


def accuracy(correct: int, images: int) -> Accuracy:
    """The share of right ones.

    Raises:
        ValueError: there are no images.
    """
    if images <= 0 or not 0 <= correct <= images:
        raise ValueError(f"{correct} of {images}")
    share = correct / images
    scale = 1 + _Z**2 / images
    centre = (share + _Z**2 / (2 * images)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / images + _Z**2 / (4 * images**2))
    return Accuracy(images, correct, share, max(0.0, centre - half), min(1.0, centre + half))


def corruption_error(errors: Mapping[str, Mapping[int, float]], baseline: Mapping[str, Mapping[int, float]]) -> float:
    """mCE: the mean over corruptions of Σ errors / Σ errors of the baseline, over the severities of both.

    Hendrycks and Dietterich, arXiv 1903.12261, section 4.2. A corruption in which the baseline makes no error counts
    as 1 when neither errs, and makes the result infinite otherwise.

    Raises:
        ValueError: they are not of the same corruptions and severities, or of none.
    """
    if not errors or {c: set(s) for c, s in errors.items()} != {c: set(s) for c, s in baseline.items()}:
        raise ValueError("other corruptions or severities than the baseline's, or none")
    ratios = []
    for corruption, by_severity in errors.items():
        above, below = sum(by_severity.values()), sum(baseline[corruption].values())
        ratios.append(above / below if below else 1.0 if not above else math.inf)
    return sum(ratios) / len(ratios)
