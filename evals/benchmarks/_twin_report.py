"""What came out of the study of twins, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from _report import found_on, on
from _signature_outcome import interval, percent, points
from weightlab_evals.twins.networks import RANK
from weightlab_evals.twins.study import MAIN, ROUTERS, SCALES, TENTH
from weightlab_evals.twins.texts import TASKS, UNSEEN

Found = Mapping[str, Any]
Row = Mapping[str, float]
RowOf = Callable[[Found], Row]
HEADROOM = 0.93
"""Where the best static merge is above that share of the experts, there is little to gain."""
SPARSE = ("sparse:0.1", "random:0.1")
"""A tenth of the elements, those of the largest magnitude, or drawn at random and scaled up."""
ROUTED = "trained, routed head"
STATIC = {
    "averaging": "averaging",
    "task_arithmetic": "task arithmetic",
    "ties:0.2": "TIES, density 0.2",
    "ties:0.5": "TIES, density 0.5",
}


def report(result: Found) -> str:
    """Everything a reader of the README should see."""
    versions, seeds = result["versions"], result["seeds"]
    lines = [
        f"On {found_on(result)}; Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, peft {versions['peft']}."
    ]
    if seeds:
        lines += ["", *_table(seeds), "", *_claims(seeds), "", *_sizes(seeds), "", *_routing(seeds)]
    if "timing" in result:
        lines += ["", *_timing(result["timing"], result["timed on"])]
    return "\n".join(lines)


def normalised(seed: Found, row: Row) -> float:
    """The mean over the tasks of the score, in units of that task's expert's."""
    return fmean(row[task] / seed["rows"]["experts"][task] for task in TASKS)


def closed(seed: Found, row: Row) -> float:
    """The share of what lies between the best static merge and the experts."""
    best = max(normalised(seed, seed["static"][name]["row"]) for name in STATIC)
    return (normalised(seed, row) - best) / (1 - best)


def _table(seeds: Sequence[Found]) -> list[str]:
    rows: list[tuple[str, RowOf, float]] = [
        ("five experts", lambda s: s["rows"]["experts"], _full(seeds) * len(TASKS)),
        ("base", lambda s: s["rows"]["base"], 0.0),
        *((title, _static(name), _full(seeds)) for name, title in STATIC.items()),
        ("one model trained on all", lambda s: s["rows"]["multitask"], _full(seeds)),
        ("full experts, the router's choice", lambda s: s["rows"]["full experts, hard routing"], _full(seeds) * 5),
        *_without_rows(seeds),
        *((f"**twin, {c}**", _twin(c, ROUTED), _megabytes(seeds, c)) for c in (MAIN, TENTH, *SPARSE)),
        (f"LoRA experts, rank {RANK}", lambda s: s["rows"]["LoRA experts"], seeds[0]["LoRA bytes"] / 1e6),
        (
            f"twin of them, {TENTH}",
            lambda s: s["LoRA twin"]["rows"][ROUTED],
            sum(seeds[0]["LoRA twin"]["bytes"].values()) / 1e6,
        ),
    ]
    lines = [
        "Balanced accuracy in % on 1,000 texts a task, means over seeds; then the mean over tasks in units of the "
        "experts, with its 95 % interval (Student's t over seeds). MB are beside the base. Twins here are routed by "
        "the trained router, output layer included.",
        "",
        f"| | {' | '.join(TASKS)} | of experts, % | {UNSEEN} | MB |",
        f"|---|{'---:|' * (len(TASKS) + 3)}",
    ]
    for title, row, size in rows:
        tasks = [f"{100 * fmean(row(seed)[task] for seed in seeds):.1f}" for task in TASKS]
        relative = percent(*interval([normalised(seed, row(seed)) for seed in seeds]))
        unseen = [row(seed)[UNSEEN] for seed in seeds if UNSEEN in row(seed)]
        told = f"{100 * fmean(unseen):.1f}" if unseen else "–"
        lines.append(f"| {title} | {' | '.join(tasks)} | {relative} | {told} | {size:.0f} |")
    chosen = []
    for name in SCALES:
        every = ", ".join(f"{seed['static'][name]['scale']:g}" for seed in seeds)
        chosen.append(f"{STATIC[name]} {every}")
    scales = "; ".join(chosen)
    alone = ", ".join(f"{task} {100 * fmean(s['cross'][task] for s in seeds):.1f}" for task in TASKS)
    return [
        *lines,
        "",
        f"Scales chosen on 300 other texts a task: {scales}. {UNSEEN.capitalize()} by each expert alone: {alone}.",
    ]


def _without_rows(seeds: Sequence[Found]) -> list[tuple[str, RowOf, float]]:
    rows: list[tuple[str, RowOf, float]] = []
    for name in seeds[0]["without shared part"]:
        first = seeds[0]["without shared part"][name]
        size = sum(first["bytes"].values()) / 1e6
        title = f"θt − θ0 itself, low_rank:{first['rank']} ({name}), routed"
        rows.append((title, lambda s, name=name: s["without shared part"][name]["rows"][ROUTED], size))  # type: ignore[misc]
    return rows


def _claims(seeds: Sequence[Found]) -> list[str]:
    best = interval([max(normalised(s, s["static"][name]["row"]) for name in STATIC) for s in seeds])
    headroom = "there is headroom" if best[0] <= HEADROOM else "**no headroom**"
    lines = [
        f"The best static merge has {percent(*best)} % of the experts: {headroom}. Of what lies between, a twin with "
        "the trained router and routed heads closes"
    ]
    told = []
    for compress in (MAIN, TENTH, *SPARSE):
        share = interval([closed(seed, _twin(compress, ROUTED)(seed)) for seed in seeds])
        part = _part(seeds, compress) / _full(seeds)
        told.append(f"{percent(*share)} % at {compress} (each part {part:.1%} of a model)")
    lines[0] += f" {'; '.join(told)}."
    differences = []
    for name, words in (("equal rank", "the same rank"), ("equal bytes", "the same bytes")):
        gains = [
            normalised(s, _twin(MAIN, ROUTED)(s)) - normalised(s, s["without shared part"][name]["rows"][ROUTED])
            for s in seeds
        ]
        differences.append(f"{points(*interval(gains))} points against {words}")
    lines.append(f"What the shared part adds to low-rank θt − θ0 ({MAIN}): {'; '.join(differences)}.")
    return lines


def _sizes(seeds: Sequence[Found]) -> list[str]:
    kinds = ["oracle", *(f"{router}, {head}" for router in ROUTERS for head in ("true head", "routed head"))]
    lines = [
        "**Sizes, routers, heads.** Means in % of the experts; the oracle knows whose text it is. One part in MB.",
        "",
        f"| parts | MB | {' | '.join(kinds)} |",
        f"|---|{'---:|' * (len(kinds) + 1)}",
    ]
    for compress in seeds[0]["twins"]:
        cells = []
        for kind in kinds:
            if kind in seeds[0]["twins"][compress]["rows"]:
                cells.append(percent(*interval([normalised(s, _twin(compress, kind)(s)) for s in seeds])))
            else:
                cells.append("–")
        lines.append(f"| {compress} | {_part(seeds, compress):.1f} | {' | '.join(cells)} |")
    return lines


def _routing(seeds: Sequence[Found]) -> list[str]:
    lines = [
        "**Routing.** Test texts whose largest weight is their own expert's, in %; and where the unseen ones go.",
        "",
        f"| router | {' | '.join(TASKS)} | {UNSEEN} |",
        f"|---|{'---:|' * len(TASKS)}---|",
    ]
    for router in ROUTERS:
        shares = [seed["routing"][router] for seed in seeds]
        right = [percent(*interval([share[task][task] for share in shares])) for task in TASKS]
        goes = {task: fmean(share[UNSEEN][task] for share in shares) for task in TASKS}
        told = ", ".join(
            f"{task} {goes[task]:.0%}" for task in sorted(goes, key=lambda t: -goes[t]) if goes[task] > 0.05
        )
        lines.append(f"| {router} | {' | '.join(right)} | {told} |")
    return lines


def _timing(found: Mapping[str, Found], where: Found) -> list[str]:
    lines = [
        f"**Time.** On {on(where)}. Milliseconds a sample in a batch of 32 of 16 to 48 words, parts at rank 16; in "
        "brackets in units of "
        "the shared model alone.",
        "",
        f"| | {' | '.join(found)} |",
        f"|---|{'---:|' * len(found)}",
    ]
    for way in next(iter(found.values()))["milliseconds"]:
        cells = []
        for each in found.values():
            taken, plain = each["milliseconds"][way], each["milliseconds"]["the shared model alone"]
            cells.append(f"{taken:.1f} ({taken / plain:.2f})")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for title, each in found.items():
        taken = each["milliseconds"]
        routed = taken["twin, with its router"]
        times = [
            f"{taken[way] / routed:.1f} times as fast as {way}" for way in taken if way.startswith("merging for every")
        ]
        lines += [
            "",
            f"{title}: with its router a twin is {', and '.join(times)} "
            f"(answers differ by {each['furthest']:.0e} at most, relative to the largest). `weightlab twin split` took "
            f"{each['split']['seconds']:.0f} s and {each['split']['peak'] / 1e9:.2f} GB of memory "
            f"({each['split']['anonymous'] / 1e9:.2f} GB without mapped files), for {each['bytes']['base'] / 1e6:.0f} "
            f"MB a model.",
        ]
    return lines


def _static(name: str) -> RowOf:
    return lambda seed: seed["static"][name]["row"]


def _twin(compress: str, kind: str) -> RowOf:
    return lambda seed: seed["twins"][compress]["rows"][kind]


def _full(seeds: Sequence[Found]) -> float:
    """A model's MB: what the shared part, stored dense, has."""
    return float(seeds[0]["twins"][MAIN]["bytes"]["shared"]) / 1e6


def _part(seeds: Sequence[Found], compress: str) -> float:
    """MB of one exclusive part, on average."""
    return fmean(size for s in seeds for name, size in s["twins"][compress]["bytes"].items() if name != "shared") / 1e6


def _megabytes(seeds: Sequence[Found], compress: str) -> float:
    return fmean(sum(seed["twins"][compress]["bytes"].values()) for seed in seeds) / 1e6
