"""What came out of the study of signatures, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from _report import found_on
from _signature_claims import TITLES, claims
from _signature_outcome import CLEAN, TOLD, Found, Outcome, interval, percent, share_of_gap
from weightlab_evals.signatures.patches import FAMILIES

METHODS = {
    "standard": "standard (fine-tuned on clean images)",
    "trained": "trained on the corruption",
    "augmented": "trained with augmentation",
    "signature": "**RWS**",
    "unprojected": "θr − θ0, not projected",
    "from clean": "θr − θc",
    "random": "random, as long tensor by tensor",
    "other corruption": "another corruption's RWS (mean of three)",
    "statistics": "only running statistics of the trained one",
    "recalibrated": "only recalibrated on corrupted training images",
    "8 bits": "RWS at 8 bits",
    "4 bits": "RWS at 4 bits",
    "3 bits": "RWS at 3 bits",
    "2 bits": "RWS at 2 bits",
}


def report(result: Found) -> str:
    """Everything a reader of the README should see."""
    versions, seeds = result["versions"], result["seeds"]
    lines = [
        f"{len(seeds)} seeds, each with its own split of the images; accuracies in % of test images, means over seeds "
        f"with 95 % intervals (Student's t). On {found_on(result)}; Python {versions['python']}, torch "
        f"{versions['torch']}, corrupt-tta {versions['corrupt-tta']}.",
        "",
        "Chosen on validation images of A:",
        "",
    ]
    for network, found in result["networks"].items():
        lines.append(f"- {TITLES[network]}: {_choice(found)}")
    for title, only in (("Gaussian noise", ["gaussian_noise"]), ("Mean over all 19 corruptions", None)):
        lines += ["", f"**{title}**, severity 5", "", *_by_method(result["networks"], only)]
    lines += ["", *_folded("Every corruption", _by_corruption(result["networks"]))]
    told = [line for claim, every in claims(result).items() for line in (f"- *{claim}*", *(f"  - {e}" for e in every))]
    lines += ["", *_folded("The paper's claims and observations, and what was found here", told)]
    return "\n".join(lines)


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    """Shown by GitHub when it is clicked on."""
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"]


def _choice(found: Found) -> str:
    form = found["choice"]["form"]
    tried = ", ".join(
        f"K = {f['depth']}{'' if f['norm'] == 'keep' else ' ' + f['norm']} {f['corrupted']:.1%}" for f in found["forms"]
    )
    alphas = sorted(found["choice"]["alphas"]["signature"].values())
    norm = "" if form["norm"] == "keep" else f", --norm {form['norm']}"
    return (
        f"K = {form['depth']}{norm}, α from {alphas[0]:g} to {alphas[-1]:g} by corruption "
        f"(mean accuracy on corrupted images, each form at its best α: {tried})"
    )


def _by_method(networks: Found, only: Sequence[str] | None) -> list[str]:
    heads = [f"{TITLES[n]}, {d}" for n in networks for d in ("A", "B")]
    lines = [f"| corrupted / clean | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    tests = {network: Outcome(found) for network, found in networks.items()}
    for method, title in METHODS.items():
        cells = []
        for every in tests.values():
            names = only or every.names
            for domain in ("A", "B"):
                if not every.has(domain, method):
                    cells.append("")
                    continue
                cell = percent(*interval(every.seedwise(domain, method, names)))
                if every.has(domain, method + CLEAN):
                    cell += f" / {every.mean(domain, method + CLEAN, names) * 100:.1f}"
                cells.append(cell)
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    share = [
        share_of_gap(every.closed(domain, "signature", only or every.names))
        for every in tests.values()
        for domain in ("A", "B")
    ]
    return [*lines, f"| share of the gap that RWS closes | {' | '.join(share)} |"]


def _by_corruption(networks: Found) -> list[str]:
    heads = [f"{TITLES[n]} {d}" for n in networks for d in ("A", "B")]
    lines = [
        "Standard → with RWS / trained on it (share of the gap closed; – where the gap is under "
        f"{TOLD * 100:.0f} points):",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    tests = [Outcome(found) for found in networks.values()]
    for name in (name for family in FAMILIES.values() for name in family):
        cells = []
        for every in tests:
            for domain in ("A", "B"):
                low, with_it, high = (every.mean(domain, m, [name]) for m in ("standard", "signature", "trained"))
                share = share_of_gap(every.closed(domain, "signature", [name]))
                cells.append(f"{low:.1%} → {with_it:.1%} / {high:.1%} ({share})".replace("%", ""))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines
