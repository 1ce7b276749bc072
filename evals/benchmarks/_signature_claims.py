"""Each claim and observation of arXiv 2302.12480, with the number that was found, also where it did not hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from _signature_files import ENCODINGS
from _signature_outcome import CLEAN, TOLD, Found, Outcome, interval, points, share_of_gap

TITLES = {"vgg": "VGG", "vgg_bn": "VGG with BatchNorm", "vit": "ViT"}


def claims(result: Found) -> dict[str, list[str]]:
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
        "(Ours) RWS less controls, gaussian noise, in points, over more seeds:": each(_controls),
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
        f"{title}, all {share_of_gap(tests.closed(domain, 'signature', names))}, gaussian noise "
        f"{share_of_gap(tests.closed(domain, 'signature', noise))}"
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
        f"{domain}{kind} {points(*tests.difference(domain, 'signature' + kind, 'unprojected' + kind, tests.names))}"
        for domain in ("A", "B")
        for kind in ("", CLEAN)
    )


def _controls(network: str, found: Found, tests: Outcome) -> str:
    many = found["controls"]

    def less(domain: str, other: str) -> str:
        return points(*interval([seed[domain]["signature"] - seed[domain][other] for seed in many]))

    told = []
    for domain in ("A", "B"):
        low, mine, high = (fmean(seed[domain][m] for seed in many) for m in ("standard", "signature", "trained"))
        share = share_of_gap((mine - low) / (high - low) if high - low >= TOLD else None)
        clean = [seed[domain][f"signature{CLEAN}"] - seed[domain][f"standard{CLEAN}"] for seed in many]
        told.append(
            f"{domain} random {less(domain, 'random')}, other corruptions {less(domain, 'other corruption')}, "
            f"not projected {less(domain, 'unprojected')} ({low:.1%} → {mine:.1%} / {high:.1%}, {share} of the gap; "
            f"on clean images {points(*interval(clean))})"
        )
    return f"over {len(many)} seeds, {'; '.join(told)}"


def _quantised(network: str, found: Found, tests: Outcome) -> str:
    told = []
    for bits in ("8 bits", "4 bits", "3 bits", "2 bits"):
        worst = min(tests.difference("A", bits, "signature", [name])[0] for name in tests.names)
        told.append(
            f"{bits} {tests.difference('A', bits, 'signature', tests.names)[0] * 100:+.2f} ({worst * 100:+.2f})"
        )
    return "; ".join(told)
