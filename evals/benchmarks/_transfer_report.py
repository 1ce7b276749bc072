"""What came out of the study of transfer, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from _report import found_on, on
from _signature_outcome import interval, percent, share_of_gap
from weightlab_evals.transfer.begin import MODELS
from weightlab_evals.transfer.study import CONTROLS, MAIN

from weightlab.ops.connectivity import Link, forecast_of

Found = Mapping[str, Any]
TABLE = {
    "v1": "v1",
    "FT(v1)": "FT(v1), whose Δ is FT(v1) − v1",
    "v2": "v2",
    "v2 + Δ": "**v2 + Δ**",
    "v2 + λΔ": "v2 + λΔ, λ chosen",
    "FT(v2)": "FT(v2)",
}
SLACK = 0.01
"""A fine-tune counts as having arrived where it is no more than this below what the one from v2 ends with."""


def report(result: Found) -> str:
    """Everything a reader of the README should see."""
    models: Mapping[str, Sequence[Found]] = result["models"]
    versions = result["versions"]
    lines = [
        f"On {found_on(result)}; Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, lm_eval {versions['lm_eval']}. Means over "
        "seeds with 95 % intervals (Student's t).",
        "",
        *_table(models),
        "",
        *_ladder(models),
        "",
        *_controls(models),
        "",
        *_steps(models),
        "",
        *_barriers(models),
    ]
    if "timing" in result:
        lines += ["", *_timing(result["timing"], result["timed on"])]
    return "\n".join(lines)


def arrived(seed: Found) -> float:
    """The share of the gap in accuracy between v2 and FT(v2) that v2 + Δ closes."""
    low, found, high = (seed["table"][row]["right"] for row in ("v2", "v2 + Δ", "FT(v2)"))
    return float((found - low) / (high - low))


def kept(seed: Found) -> float:
    """The share of v2's gain in perplexity over v1, in nats, that v2 + Δ keeps."""
    import math

    before, gained, found = (math.log(seed["table"][row]["perplexity"]) for row in ("v1", "v2", "v2 + Δ"))
    return (before - found) / (before - gained)


def first_there(seed: Found) -> dict[str, int | None]:
    """The first watched step, after 0, at which a fine-tune is as good as the one from v2 ends; None: never."""
    curves = {name: {int(s): v for s, v in curve.items()} for name, curve in seed["steps"].items()}
    last = curves["v2"]
    wanted = last[max(last)] - SLACK
    return {
        name: next((step for step in sorted(curve) if step and curve[step] >= wanted), None)
        for name, curve in curves.items()
    }


def _table(models: Mapping[str, Sequence[Found]]) -> list[str]:
    heads = [f"{MODELS[m].title}, {what}" for m in models for what in ("topics told, %", "perplexity of plays")]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row, title in TABLE.items():
        cells = []
        for seeds in models.values():
            cells.append(percent(*interval([seed["table"][row]["right"] for seed in seeds])))
            cells.append(_number(*interval([seed["table"][row]["perplexity"] for seed in seeds])))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    shares = [_share(seeds, of) for seeds in models.values() for of in (arrived, kept)]
    lines.append(f"| share of the gap that arrives, of v2's gain that stays | {' | '.join(shares)} |")
    chosen = []
    for name, seeds in models.items():
        scales = ", ".join(f"{seed['scale']['scale']:g}" for seed in seeds)
        chosen.append(f"{MODELS[name].title}: {scales}")
    return [*lines, "", f"λ chosen on 300 other articles: {'; '.join(chosen)}."]


def _ladder(models: Mapping[str, Sequence[Found]]) -> list[str]:
    lines = [
        f"**How far away it may be.** Version 2 at ‖v2 − v1‖ / ‖Δ‖; the table above has that at {MAIN:g}. "
        "Ratio, distance (‖v2 − v1‖ / ‖v1‖) and forecast are what `weightlab connectivity` says beforehand. Topics "
        "told, in % of 400.",
        "",
        "| | ratio | distance | forecast | v2 | v2 + Δ | FT(v2) | arrives |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, seeds in models.items():
        for place, rung in enumerate(seeds[0]["ladder"]):
            every = [seed["ladder"][place] for seed in seeds]
            means = [_mean(every, key) for key in ("right", "right with delta", "right when tuned")]
            share = share_of_gap((means[1] - means[0]) / (means[2] - means[0]))
            ratio, distance = _mean(every, "ratio"), _mean(every, "distance")
            lines.append(
                f"| {MODELS[name].title}, {rung['mark']:g} | {ratio:.2g} | {distance:.3f} | {_forecasts(every)} "
                f"| {' | '.join(f'{100 * m:.1f}' for m in means)} | {share} |"
            )
    return lines


def _controls(models: Mapping[str, Sequence[Found]]) -> list[str]:
    lines = [
        "**Where it has to fail.** Version 2 with its neurons in another order (the same function), with those of the "
        "feed-forward parts alone in another order, and a network that was never trained:",
        "",
        "| | cosine | ratio | forecast | perplexity | base | base + Δ |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, seeds in models.items():
        for control in CONTROLS:
            every = [seed["controls"][control] for seed in seeds]
            right, with_delta = (100 * _mean(every, key) for key in ("right", "right with delta"))
            lines.append(
                f"| {MODELS[name].title}, {control} | {_mean(every, 'cosine'):.2f} | {_mean(every, 'ratio'):.2g} "
                f"| {_forecasts(every)} | {_mean(every, 'perplexity'):.4g} | {right:.1f} | {with_delta:.1f} |"
            )
    return lines


def _steps(models: Mapping[str, Sequence[Found]]) -> list[str]:
    lines = [
        "**Fine-tuning from there.** Topics told, in % of 300 articles, after so many steps at one constant rate:",
        "",
    ]
    steps = sorted(int(s) for s in next(iter(models.values()))[0]["steps"]["v2"])
    lines += [
        f"| from | {' | '.join(map(str, steps))} | as good at step |",
        f"|---|{'---:|' * len(steps)}---|",
    ]
    for name, seeds in models.items():
        for start in ("v2", "v2 + Δ"):
            means = [_mean([seed["steps"][start] for seed in seeds], str(step)) for step in steps]
            there = [first_there(seed)[start] for seed in seeds]
            told = ", ".join("never" if step is None else str(step) for step in there)
            lines.append(f"| {MODELS[name].title}, {start} | {' | '.join(f'{100 * m:.1f}' for m in means)} | {told} |")
    return [*lines, "", f"As good: at most {100 * SLACK:g} point below where the one from v2 ends; one number a seed."]


def _barriers(models: Mapping[str, Sequence[Found]]) -> list[str]:
    told = []
    for name, seeds in models.items():
        absolute = interval([seed["barrier"]["barrier"] for seed in seeds])
        relative = [seed["barrier"]["relative"] for seed in seeds if seed["barrier"]["relative"] is not None]
        told.append(
            f"{MODELS[name].title} {_number(*absolute)} nats, {percent(*interval(relative))} % of what tuning gains"
        )
    return [f"**The barrier** between FT(v1) and FT(v2) on the topics' words, at 11 points: {'; '.join(told)}."]


def _timing(found: Found, where: Found) -> list[str]:
    lines = [
        f"**Ten scales, one model.** On {on(where)}. Seconds to score a patch of SmolLM2 at ten scales: "
        "`weightlab eval lm`, which "
        "loads the model once, against ten runs of lm_eval on ten written models (and the seconds that writing took). "
        f"Starting lm_eval takes {found['start']:.1f} s each time, which the last column leaves out.",
        "",
        "| questions | in memory | ten runs | writing | ratio | without start-up |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        bare = (row["memory"] - found["start"]) / (row["written"] - 10 * found["start"])
        lines.append(
            f"| {row['questions']} | {row['memory']:.0f} | {row['written']:.0f} | {row['writing']:.0f} "
            f"| {row['memory'] / row['written']:.2f} | {bare:.2f} |"
        )
    same = all(row["same"] for row in found["rows"])
    return [*lines, "", "Both gave the same scores." if same else "The scores differ."]


def _share(seeds: Sequence[Found], of: Callable[[Found], float]) -> str:
    return f"{percent(*interval([of(seed) for seed in seeds]))} %"


def _mean(every: Sequence[Found], key: str) -> float:
    return interval([each[key] for each in every])[0]


def _number(mean: float, half: float) -> str:
    return f"{mean:.3g}" + (f" ± {half:.2g}" if half != float("inf") else "")


def _forecasts(every: Sequence[Found]) -> str:
    links = [(Link(*(each[field.name] for field in fields(Link))), each["lost"]) for each in every]
    return ", ".join(dict.fromkeys(forecast_of(link, lost) for link, lost in links))
