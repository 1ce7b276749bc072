"""What comes out when patches are put on: accuracies for choosing, and of what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

import weightlab as wl
from weightlab_evals.signatures.checkpoints import AUGMENTED, FURTHER, Checkpoints, State
from weightlab_evals.signatures.data import CLEAN
from weightlab_evals.signatures.patches import DEPTHS, NORMS, Form, Patches, others
from weightlab_evals.signatures.training import accuracy

ALPHAS = (0.25, 0.5, 0.75, 1.0)
BITS = (8, 4, 3, 2)
PLOTTED = (0.25, 0.5, 0.75, 1.0, 1.5)
COMPOSED = (
    ("gaussian_noise", "defocus_blur"),
    ("gaussian_noise", "contrast"),
    ("motion_blur", "fog"),
    ("gaussian_noise", "defocus_blur", "contrast"),
    ("impulse_noise", "motion_blur", "fog"),
)
RIVALS = ("unprojected", "from clean")
Tried = dict[str, float]
"""Accuracy on a validation part: {"clean", "corrupted"}."""
Row = dict[str, float]
"""Accuracies by the name of what was scored."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the validation parts decided for one network.

    Attributes:
        alphas: {what is put on: {corruption: α}}.
    """

    form: Form
    alphas: Mapping[str, Mapping[str, float]]


class Scores:
    """Accuracies of one network and seed."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._have, self._patches = checkpoints, Patches(checkpoints)
        self._module = checkpoints.module()

    def baseline(self, corruption: str) -> dict[str, Tried]:
        """On the validation part of A: the standard model and the one trained on the corruption."""
        return {
            "standard": self._tried(self._have.tuned("A"), corruption),
            "trained": self._tried(self._have.tuned("A", corruption), corruption),
        }

    def forms(self, corruption: str) -> list[dict[str, Any]]:
        """On the validation part of A: a signature in every form and at every α."""
        found = []
        for norm in NORMS[self._have.network]:
            for depth in DEPTHS[self._have.network]:
                patch = self._patches.signature(corruption, Form(depth, norm))
                found += [{"depth": depth, "norm": norm, **tried} for tried in self._at_every_alpha(patch, corruption)]
        return found

    def rivals(self, corruption: str, form: Form) -> dict[str, list[dict[str, float]]]:
        """On the validation part of A: what a signature is compared with, at every α."""
        like = self._patches.signature(corruption, form)
        return {name: self._at_every_alpha(self._rival(name, corruption, like), corruption) for name in RIVALS}

    def on_tests(self, corruption: str, choice: Choice) -> dict[str, Row]:
        """On the test parts: everything about one corruption, by domain."""
        form, own = choice.form, choice.alphas["signature"][corruption]
        signature = self._patches.signature(corruption, form)
        rival = {name: self._rival(name, corruption, signature) for name in RIVALS}
        on = {
            "signature": signature.at(own),
            **{name: patch.at(choice.alphas[name][corruption]) for name, patch in rival.items()},
            "random": self._patches.random(corruption, signature).at(own),
            **{
                f"{bits} bits": self._patches.signature(corruption, form, encode=f"quantized:{bits}").at(own)
                for bits in BITS
            },
        }
        other = [
            self._patches.signature(name, form).at(choice.alphas["signature"][name]) for name in others(corruption)
        ]
        found: dict[str, Row] = {}
        for domain in ("A", "B"):
            found[domain] = self._row(domain, corruption, self._states(domain, corruption, on))
            found[domain]["other corruption"] = fmean(
                self._accuracy(wl.apply(self._have.tuned(domain), patch), domain, "test", corruption) for patch in other
            )
            scaled = {f"{a:g}": wl.apply(self._have.tuned(domain), signature.at(a)) for a in PLOTTED}
            found[f"{domain} by alpha"] = self._row(domain, corruption, scaled)
        few, many = Patches(self._have, "A 0-4").signature(corruption, form).at(own), self._have.tuned("A 5-9")
        found["A 5-9"] = self._row(
            "A 5-9",
            corruption,
            {
                "standard": many,
                "trained": self._have.tuned("A 5-9", corruption),
                "signature": wl.apply(many, few),
            },
        )
        further = self._have.tuned("A", start=FURTHER)
        moved = wl.apply(further, signature.at(own))
        found["further"] = self._row("A", corruption, {"standard": further, "signature": moved})
        return found

    def composed(self, choice: Choice) -> list[dict[str, Any]]:
        """On the test part of A: several signatures at once, each at its α and each at its share of it."""
        found = []
        for names in COMPOSED:
            for share in (1.0, 1 / len(names)):
                alphas = [choice.alphas["signature"][name] * share for name in names]
                patches = [self._patches.signature(n, choice.form).at(a) for n, a in zip(names, alphas, strict=True)]
                state = wl.apply(self._have.tuned("A"), patches)
                row = {name: self._accuracy(state, "A", "test", name) for name in (CLEAN, *names)}
                found.append({"corruptions": list(names), "share": share, "accuracy": row})
        return found

    def _rival(self, name: str, corruption: str, like: wl.Patch) -> wl.Patch:
        make = {"unprojected": self._patches.unprojected, "from clean": self._patches.from_clean}[name]
        return make(corruption, like)

    def _states(self, domain: str, corruption: str, on: Mapping[str, wl.Patch]) -> dict[str, State]:
        """Models of A or B to score."""
        standard, theirs = self._have.tuned(domain), Patches(self._have, domain)
        states = {
            "standard": standard,
            "trained": self._have.tuned(domain, corruption),
            "augmented": self._have.tuned(domain, AUGMENTED),
            **{name: wl.apply(standard, patch) for name, patch in on.items()},
        }
        if "recalibrate" in NORMS[self._have.network]:
            # Running statistics travel from A with a patch; recalibration is what a user of B can do there.
            states["statistics"] = {**standard, **self._patches.statistics_of(corruption)}
            states["recalibrated"] = {**standard, **theirs.recalibrated(corruption)}
        return states

    def _row(self, domain: str, corruption: str, states: Mapping[str, State]) -> Row:
        found: Row = {}
        for name, state in states.items():
            found[name] = self._accuracy(state, domain, "test", corruption)
            found[f"{name}, {CLEAN}"] = self._accuracy(state, domain, "test", CLEAN)
        return found

    def _at_every_alpha(self, patch: wl.Patch, corruption: str) -> list[dict[str, float]]:
        clean = self._have.tuned("A")
        return [{"alpha": a, **self._tried(wl.apply(clean, patch.at(a)), corruption)} for a in ALPHAS]

    def _tried(self, state: Mapping[str, Tensor], corruption: str) -> Tried:
        return {
            "clean": self._accuracy(state, "A", "choose", CLEAN),
            "corrupted": self._accuracy(state, "A", "choose", corruption),
        }

    def _accuracy(self, state: Mapping[str, Tensor], domain: str, use: str, corruption: str) -> float:
        self._module.load_state_dict(state)
        return accuracy(self._module, self._have.shown(domain, use, corruption))
