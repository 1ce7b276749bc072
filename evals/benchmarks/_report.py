"""What came out of the engine's benchmark: medians, the ratios that are claimed, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click


def medians(repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each number of each command, over the runs that succeeded; of some the extremes too."""
    found: dict[str, dict[str, float]] = {}
    for label, every in repetitions.items():
        runs = [run for run in every if run["exit_code"] == 0]
        if not runs:
            continue
        numbers = [name for name, value in runs[0].items() if isinstance(value, (int, float))]
        found[label] = {name: statistics.median(run[name] for run in runs) for name in numbers}
        found[label]["runs"] = len(runs)
        found[label]["synced_seconds"] = statistics.median(run["seconds"] + run["sync_seconds"] for run in runs)
        for name in ("seconds", "peak_bytes"):
            values = [run[name] for run in runs]
            found[label] |= {f"least_{name}": min(values), f"largest_{name}": max(values)}
    return found


def ratios(middle: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], touched: int) -> list[dict[str, Any]]:
    """What is claimed, with its target; None where something needed was not measured.

    Args:
        middle: what `medians` found.
        sizes: bytes of the patches.
        touched: bytes of the tensors that the small patch changes.
    """
    rivals = [label for label in middle if label.startswith("mergekit_")]
    rival = min(rivals, key=lambda label: middle[label]["seconds"], default="mergekit")  # its fastest way
    rival_ties = min(
        (label for label in middle if label.startswith("ties_mergekit_")),
        key=lambda label: middle[label]["seconds"],
        default="ties_mergekit",
    )
    named, named_ties = rival.replace("_", " "), rival_ties.removeprefix("ties_").replace("_", " ")

    def value(label: str, number: str = "seconds", less: str = "") -> float | None:
        """A median, less the seconds that starting up takes."""
        if label not in middle or (less and less not in middle):
            return None
        return middle[label][number] - (middle[less]["seconds"] if less else 0)

    out, synced, peak, written = "apply_out_dense", "synced_seconds", "peak_bytes", "written_bytes"
    anonymous = "peak_anonymous_bytes"
    rows: list[tuple[str, float | None, float | None, float | None]] = [
        (f"apply --out / {named}: time", value(out), value(rival), 0.30),
        (f"apply --out / {named}: time, each with its sync", value(out, synced), value(rival, synced), None),
        (
            f"apply --out / {named}: time, each less its start",
            value(out, less="start_weightlab"),
            value(rival, less="start_mergekit"),
            None,
        ),
        (f"apply --out / {named}: peak memory", value(out, peak), value(rival, peak), 0.17),
        (f"apply --out / {named}: peak without mapped files", value(out, anonymous), value(rival, anonymous), None),
        ("apply --out: peak memory / 600 MB", value(out, peak), 600e6, 1.0),
        (
            "apply --out: peak memory at the larger size / at the size",
            value(f"{out}_scaled", peak),
            value(out, peak),
            1.1,
        ),
    ]
    for verb in ("apply", "remove"):
        label, claimed = f"{verb}_in_place", verb == "apply"
        rows += [
            (f"{verb} in place: bytes written / touched", value(label, written), touched, 2.3 if claimed else None),
            (
                f"{verb} in place less start / cp -r with sync: time",
                value(label, less="start_weightlab"),
                value("copy", synced),
                0.35 if claimed else None,
            ),
        ]
    rows += [
        (f"TIES / {named_ties}: time", value("ties"), value(rival_ties), 0.12),
        (
            f"TIES / {named_ties}: time, each less its start",
            value("ties", less="start_weightlab"),
            value(rival_ties, less="start_mergekit"),
            None,
        ),
        (f"TIES / {named_ties}: peak memory", value("ties", peak), value(rival_ties, peak), 0.15),
        (
            f"TIES / {named_ties}: peak without mapped files",
            value("ties", anonymous),
            value(rival_ties, anonymous),
            None,
        ),
        ("diff exact / reminis diff: time", value("diff_exact"), value("reminis_diff"), None),
        ("diff exact / reminis diff: size", sizes.get("weightlab exact patch"), sizes.get("reminis pack"), None),
    ]
    found: list[dict[str, Any]] = []
    for title, over, under, target in rows:
        ratio = over / under if over is not None and under else None
        met = ratio <= target if ratio is not None and target is not None else None
        found.append({"name": title, "value": ratio, "target": target, "met": met})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Everything a reader of the README should see, as Markdown."""
    model, where, versions = result["model"], result["machine"], result["versions"]
    lines = [
        f"{model['parameters'] / 1e6:,.0f} million parameters in bf16, {model['bytes'] / 1e9:.2f} GB, "
        f"{model['shards']} shards; tuned: {model['share_of_values_changed']:.0%} of the values changed, "
        f"relative change {model['relative_change']:.1e}; the patch that is applied in place touches "
        f"{model['partial_share_of_bytes']:.1%} of the bytes. Medians of {result['parameters']['repeat']} "
        f"interleaved runs, inputs in the page cache, on {on(where)}; "
        f"Python {versions['python']}, torch {versions['torch']}, mergekit {versions['mergekit']}, "
        f"reminis {versions['reminis']}.",
        "",
        "| | seconds | with sync | peak GB | without mapped files | written GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, cost in result["medians"].items():
        if not label.startswith("prepare_"):
            failed = len(result["repetitions"][label]) - int(cost["runs"])
            name = label.replace("_", " ") + (f" ({failed} more runs failed)" if failed else "")
            lines.append(
                f"| {name} | {cost['seconds']:.2f} | {cost['synced_seconds']:.2f} "
                f"| {cost['peak_bytes'] / 1e9:.2f} | {cost['peak_anonymous_bytes'] / 1e9:.2f} "
                f"| {cost['written_bytes'] / 1e9:.3f} |"
            )
    known = [ratio for ratio in result["ratios"] if ratio["value"] is not None]
    if known:
        lines += ["", "| | came out | target |", "|---|---:|---:|"]
    for ratio in known:
        target = "" if ratio["target"] is None else f"≤ {ratio['target']:.2f}"
        missed = " (missed)" if ratio["met"] is False else ""
        lines.append(f"| {ratio['name']} | {ratio['value']:.3f}{missed} | {target} |")
    if result["sizes"]:
        lines += ["", "| | GB |", "|---|---:|"]
        lines += [f"| {name} | {count / 1e9:.3f} |" for name, count in result["sizes"].items()]
    facts = [f"- {name}: {_told(found)}" for name, found in result["checks"].items() if isinstance(found, list)]
    facts += [f"- {' '.join(note.split())}" for note in result["notes"]]
    return "\n".join([*lines, *([""] if facts else []), *facts])


def replace_between_markers(path: Path, name: str, text: str) -> str:
    """The content of the file with `text` between the markers of that benchmark; the file stays as it is.

    Raises:
        click.UsageError: the markers are not there once each, in order.
    """
    document = path.read_text()
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise click.UsageError(f"{path} needs one {begin} and, after it, one {end}")
    return f"{document.partition(begin)[0]}{begin}\n{text}\n{end}{document.partition(end)[2]}"


def on(where: Mapping[str, Any]) -> str:
    """The machine, in words."""
    return (
        f"{where['processor']}, {where['cores']} cores, {where['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {where['kernel']}, {where['filesystem']}"
    )


def found_on(result: Mapping[str, Any]) -> str:
    """What `Record.conditions` says of the machine, in words."""
    some = "" if result.get("same", True) else " (some on other machines, which the record tells)"
    return on(result["machine"]) + some


def _told(found: Sequence[Any]) -> str:
    """The outcomes of one check, each told once."""
    told = []
    for outcome in found:
        if isinstance(outcome, Mapping):
            text = f"{outcome['differing_values']:,} of {outcome['values']:,} values differ"
            if outcome["differing_values"]:
                text += f", the furthest by {outcome['units_apart']} units in the last place"
            if "at_the_limit" in outcome:
                text += (
                    f"; not counted are {outcome['at_the_limit']:,} whose difference has the very magnitude at which "
                    f"it is dropped, where one may keep some or others ({outcome['differing_at_the_limit']:,} differ)"
                )
            if outcome["names_in_one_only"]:
                text += f", {outcome['names_in_one_only']} tensors in one of them only"
        else:
            text = "yes" if outcome else "no"
        told.append(text)
    return "; ".join(dict.fromkeys(told)) + f" ({len(told)} checked)"
