"""What came out of the study of signatures, as Markdown: tables, and the paper's claims with the numbers found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from _report import on as machine_words
from _signature_files import ENCODINGS
from scipy import stats
from weightlab_evals.signatures.patches import FAMILIES

TOLD = 0.02
"""The share of a gap that is closed is told where the gap is at least so large."""
TITLES = {"vgg": "VGG", "vgg_bn": "VGG with BatchNorm", "vit": "ViT"}
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


def report(result: Found) -> str:
    """Everything a reader of the README should see."""
    versions, seeds = result["versions"], result["seeds"]
    lines = [
        f"{len(seeds)} seeds, each with its own split of the images; accuracies in % of test images, means over seeds "
        f"with 95 % intervals (Student's t). On {machine_words(result['machine'])}; Python {versions['python']}, torch "
        f"{versions['torch']}, corrupt-tta {versions['corrupt-tta']}.",
        "",
        "Chosen on validation images of A:",
        "",
    ]
    for network, found in result["networks"].items():
        lines.append(f"- {TITLES[network]}: {_choice(found)}")
    for title, only in (("Gaussian noise", ["gaussian_noise"]), ("Mean over all 19 corruptions", None)):
        lines += ["", f"**{title}**, severity 5", "", *_by_method(result["networks"], only)]
    lines += ["", "**Every corruption**", "", *_by_corruption(result["networks"])]
    lines += ["", "**The paper's claims, and what was found here**", ""]
    for claim, told in _claims(result).items():
        lines += [f"- *{claim}* {' '.join(told)}"]
    return "\n".join(lines)


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
    heads = [f"{TITLES[n]} {d}{kind}" for n in networks for d in ("A", "B") for kind in ("", ", clean")]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    tests = {network: Outcome(found) for network, found in networks.items()}
    for method, title in METHODS.items():
        cells = []
        for every in tests.values():
            names = only or every.names
            for domain in ("A", "B"):
                for kind in ("", CLEAN):
                    there = every.has(domain, method + kind)
                    cells.append(_percent(*interval(every.seedwise(domain, method + kind, names))) if there else "")
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    share = []
    for every in tests.values():
        for domain in ("A", "B"):
            share += [_share(every.closed(domain, "signature", only or every.names)), ""]
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
                share = _share(every.closed(domain, "signature", [name]))
                cells.append(f"{low:.1%} → {with_it:.1%} / {high:.1%} ({share})".replace("%", ""))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def _claims(result: Found) -> dict[str, list[str]]:
    networks: Found = result["networks"]

    def each(tell: Callable[[str, Found, Outcome], str]) -> list[str]:
        return [f"{TITLES[n]}: {tell(n, found, Outcome(found))}." for n, found in networks.items()]

    return {
        "(1) Up to 13 times smaller than a full copy.": _sizes(result["sizes"]),
        "(2) Adjustable in place by α, removable.": [*each(_by_alpha), _removal(result["comes_off"])],
        "(3) Composable.": each(_composed),
        "(4) Transferable to another data set, to other labels, to a backbone that was trained further.": each(_moved),
        "Weights change most in shallow layers.": each(_depths),
        "Signatures of different corruptions are unlike, those of one corruption on two data sets alike.": each(_alike),
        "(Ours) A signature tells its corruption: `identify` over 19, chance 5 %.": each(_identified),
        "(Ours) Does the projection help? RWS less the unprojected difference, each at its own α, in points:": each(
            _projection
        ),
        "(Ours) RWS less random and less other corruptions' signatures, gaussian noise, in points:": each(_controls),
        "(Ours) Quantised: accuracy less that of fp32, in points, mean over corruptions, and the worst of them:": each(
            _quantised
        ),
    }


def _sizes(found: Found) -> list[str]:
    told = []
    for network, by in found.items():
        parts = []
        for depth in by["fp32"]:
            factors = ", ".join(f"{by['full'] / by[e][depth]:.1f}" for e in ENCODINGS)
            parts.append(f"K = {depth}: {factors}")
        told.append(
            f"{network} ({by['full'] / 1e6:.1f} MB), by file size, in {', '.join(ENCODINGS)}: {'; '.join(parts)}."
        )
    return told


def _by_alpha(network: str, found: Found, tests: Outcome) -> str:
    alphas = [a for a in found["tests"][tests.names[0]][0]["A by alpha"] if CLEAN not in a]
    told = []
    for domain in ("A", "B"):
        every = [tests.mean(domain, "standard", tests.names)]
        every += [tests.mean(f"{domain} by alpha", alpha, tests.names) for alpha in alphas]
        told.append(f"{domain} {', '.join(f'{v:.1%}' for v in every)}")
    return f"mean over corruptions at α = 0, {', '.join(alphas)}: {'; '.join(told)}"


def _removal(found: Found) -> str:
    lacking = [f"{n}: {what}" for n, every in found.items() for what, is_so in every.items() if not is_so]
    if lacking:
        return f"Not so: {', '.join(lacking)}."
    return (
        "Two signatures on in place, the first off, the second off: the file has its first SHA-256; α = 0 gives the "
        "clean model bit for bit."
    )


def _composed(network: str, found: Found, tests: Outcome) -> str:
    told = []
    for index, group in enumerate(found["composed"][0]):
        names = group["corruptions"]
        scored = [seed[index]["accuracy"] for seed in found["composed"]]
        mean = fmean(fmean(row[name] for name in names) for row in scored)
        clean = fmean(row["clean"] for row in scored)
        alone, standard = tests.mean("A", "signature", names), tests.mean("A", "standard", names)
        share = "each at α" if group["share"] == 1 else f"at α/{len(names)}"
        told.append(
            f"{' + '.join(n.replace('_', ' ') for n in names)} {share} {mean:.1%} (none {standard:.1%}, each alone on "
            f"its own {alone:.1%}; clean {clean:.1%})"
        )
    return "; ".join(told)


def _moved(network: str, found: Found, tests: Outcome) -> str:
    names, noise = tests.names, ["gaussian_noise"]
    shares = [
        f"{title}, all {_share(tests.closed(domain, 'signature', names))}, gaussian noise "
        f"{_share(tests.closed(domain, 'signature', noise))}"
        for domain, title in (("A", "A itself"), ("B", "A's on B"), ("A 5-9", "digits 0-4's on 5-9"))
    ]
    before, after = (tests.mean("further", m, names) for m in ("standard", "signature"))
    worse = sum(tests.mean("B", "signature", [n]) < tests.mean("B", "standard", [n]) for n in names)
    return (
        f"share of the gap closed: {'; '.join(shares)}; on a backbone trained further {before:.1%} → {after:.1%}; "
        f"worse than standard on B for {worse} of {len(names)} corruptions"
    )


def _depths(network: str, found: Found, tests: Outcome) -> str:
    layers = {name: fmean(seed["depths"][name] for seed in found["alike"]) for name in found["alike"][0]["depths"]}
    return f"‖θr − θ0‖ / ‖θ0‖ by layer: {', '.join(f'{name} {change:.3f}' for name, change in layers.items())}"


def _alike(network: str, found: Found, tests: Outcome) -> str:
    cosines = {
        pair: {kind: fmean(seed["cosines"][pair][kind] for seed in found["alike"]) for kind in ("same", "different")}
        for pair in found["alike"][0]["cosines"]
    }
    told = [f"different corruptions on A {cosines.pop('A and A')['different']:.2f}"]
    told += [f"{pair}: same {c['same']:.2f}, different {c['different']:.2f}" for pair, c in cosines.items()]
    if found["other_start"]:
        kinds = {k: fmean(pair["cosines"][k] for pair in found["other_start"]) for k in ("same", "different")}
        told.append(f"two starts: same {kinds['same']:.3f}, different {kinds['different']:.3f}")
    return f"mean cosine, {'; '.join(told)}"


def _identified(network: str, found: Found, tests: Outcome) -> str:
    def right(ranks: Sequence[Mapping[str, int]]) -> str:
        every = [rank for one in ranks for rank in one.values()]
        return f"{fmean(rank == 1 for rank in every):.0%} right, mean rank {fmean(every):.1f}"

    told = [f"{pair} {right([seed['ranks'][pair] for seed in found['alike']])}" for pair in found["alike"][0]["ranks"]]
    if found["other_start"]:
        told.append(f"another θ0 {right([pair['ranks'] for pair in found['other_start']])}")
    return "; ".join(told)


def _projection(network: str, found: Found, tests: Outcome) -> str:
    return "; ".join(
        f"{domain}{kind} {_points(*tests.difference(domain, 'signature' + kind, 'unprojected' + kind, tests.names))}"
        for domain in ("A", "B")
        for kind in ("", CLEAN)
    )


def _controls(network: str, found: Found, tests: Outcome) -> str:
    return "; ".join(
        f"{domain}, {other} {_points(*tests.difference(domain, 'signature', other, ['gaussian_noise']))}"
        for domain in ("A", "B")
        for other in ("random", "other corruption")
    )


def _quantised(network: str, found: Found, tests: Outcome) -> str:
    told = []
    for bits in ("8 bits", "4 bits", "3 bits", "2 bits"):
        worst = min(tests.difference("A", bits, "signature", [name])[0] for name in tests.names)
        told.append(
            f"{bits} {tests.difference('A', bits, 'signature', tests.names)[0] * 100:+.2f} ({worst * 100:+.2f})"
        )
    return "; ".join(told)


def _percent(mean: float, half: float) -> str:
    return f"{mean * 100:.1f}" + (f" ± {half * 100:.1f}" if half != float("inf") else "")


def _points(mean: float, half: float) -> str:
    return f"{mean * 100:+.1f}" + (f" ± {half * 100:.1f}" if half != float("inf") else "")


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
