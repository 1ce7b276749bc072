"""One corruption on many seeds: a signature against controls, in the form and at the α that other seeds have chosen."""

from __future__ import annotations

from statistics import fmean

import weightlab as wl
from weightlab_evals.signatures.checkpoints import Checkpoints
from weightlab_evals.signatures.data import CLEAN
from weightlab_evals.signatures.patches import Patches, others
from weightlab_evals.signatures.scores import Choice, Row
from weightlab_evals.signatures.training import accuracy


def controls(have: Checkpoints, corruption: str, choice: Choice) -> dict[str, Row]:
    """Accuracies on the corrupted test images of A and B, and on A's and B's clean ones with and without the signature.

    Rows: standard, trained, signature, unprojected, from clean, random, other corruption (mean of three).
    """
    taken, alphas = Patches(have), choice.alphas
    signature = taken.signature(corruption, choice.form)
    own = alphas["signature"][corruption]
    on = {
        "signature": signature.at(own),
        "unprojected": taken.unprojected(corruption, signature).at(alphas["unprojected"][corruption]),
        "from clean": taken.from_clean(corruption, signature).at(alphas["from clean"][corruption]),
        "random": taken.random(corruption, signature).at(own),
    }
    other = [taken.signature(name, choice.form).at(alphas["signature"][name]) for name in others(corruption)]
    module, found = have.module(), {}
    for domain in ("A", "B"):
        standard = have.tuned(domain)
        states = {"standard": standard, "trained": have.tuned(domain, corruption)}
        states |= {name: wl.apply(standard, patch) for name, patch in on.items()}
        row: Row = {}
        for name, state in states.items():
            module.load_state_dict(state)
            row[name] = accuracy(module, have.shown(domain, "test", corruption))
            if name in ("standard", "signature"):
                row[f"{name}, {CLEAN}"] = accuracy(module, have.shown(domain, "test"))
        of_others = []
        for patch in other:
            module.load_state_dict(wl.apply(standard, patch))
            of_others.append(accuracy(module, have.shown(domain, "test", corruption)))
        row["other corruption"] = fmean(of_others)
        found[domain] = row
    return found
