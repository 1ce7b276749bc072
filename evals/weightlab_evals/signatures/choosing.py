"""K, α and what is done about normalisation layers: chosen on validation parts, by a rule that is fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from weightlab_evals.signatures.patches import Form
from weightlab_evals.signatures.scores import Choice

LOSS = 0.01
"""What a patch may cost on clean images, on average over seeds."""
SLACK = 0.01
"""A smaller K or α is taken where it is no worse than the best by more than this: it disturbs less."""

Grid = Sequence[Mapping[str, Any]]
"""What one seed found: alpha, clean, corrupted; perhaps depth and norm."""


def best_alpha(grids: Sequence[Grid], clean: Sequence[float]) -> tuple[float, float]:
    """(α, mean accuracy on corrupted images): the smallest that is good enough, of those that cost little enough.

    Where all cost too much on clean images, it is the smallest.

    Args:
        grids: of every seed, the same α each.
        clean: of every seed, what the standard model has on clean images.
    """
    means = {
        alpha: (
            fmean(base - tried["clean"] for grid, base in zip(grids, clean, strict=True) for tried in at(grid, alpha)),
            fmean(tried["corrupted"] for grid in grids for tried in at(grid, alpha)),
        )
        for alpha in sorted({tried["alpha"] for tried in grids[0]})
    }
    fit = {alpha: corrupted for alpha, (loss, corrupted) in means.items() if loss <= LOSS}
    alpha = min(a for a, value in fit.items() if value >= max(fit.values()) - SLACK) if fit else min(means)
    return alpha, means[alpha][1]


def at(grid: Grid, alpha: float) -> Grid:
    """What was found at one α."""
    return [tried for tried in grid if tried["alpha"] == alpha]


def choose_form(
    grids: Mapping[str, Sequence[Grid]], clean: Sequence[float]
) -> tuple[Form, dict[str, float], dict[Form, float]]:
    """The form for all corruptions, the α for each, and the mean accuracy of every form at its best α.

    Args:
        grids: {corruption: of every seed, every form at every α}.
    """
    forms = list(dict.fromkeys(Form(t["depth"], t["norm"]) for t in next(iter(grids.values()))[0]))
    found = {
        form: {name: best_alpha([_of(grid, form) for grid in every], clean) for name, every in grids.items()}
        for form in forms
    }
    means = {form: fmean(corrupted for _, corrupted in by_name.values()) for form, by_name in found.items()}
    good = [form for form in forms if means[form] >= max(means.values()) - SLACK]
    form = min(good, key=lambda f: (f.depth, -means[f]))
    return form, {name: alpha for name, (alpha, _) in found[form].items()}, means


def choose(
    form: Form,
    alphas: Mapping[str, float],
    rivals: Mapping[str, Mapping[str, Sequence[Grid]]],
    clean: Sequence[float],
) -> Choice:
    """The same for what a signature is compared with, whose α is chosen in the same way.

    Args:
        rivals: {rival: {corruption: of every seed, every α}}.
    """
    others = {
        rival: {name: best_alpha(every, clean)[0] for name, every in by_name.items()}
        for rival, by_name in rivals.items()
    }
    return Choice(form, {"signature": dict(alphas), **others})


def _of(grid: Grid, form: Form) -> Grid:
    return [tried for tried in grid if (tried["depth"], tried["norm"]) == (form.depth, form.norm)]
