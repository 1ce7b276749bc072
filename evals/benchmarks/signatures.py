"""Measures Robust Weight Signatures on real images; --help says what and how."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import _signature_files
import click
from _environment import cache_folder
from _record import Record, source_id
from _report import replace_between_markers
from _signature_files import sizes
from _signature_report import report
from _signature_study import removal, study
from weightlab_evals.images.corruptions import corruptions
from weightlab_evals.signatures.patches import NORMS

FIRST_SEED = 10
"""The networks, the framing of the images and the learning rates were settled in trials with seeds below."""

HELP = """Measure what arXiv 2302.12480 claims of Robust Weight Signatures, on handwritten digits that packages bring.

Three networks at 32×32: a VGG-style one without and with BatchNorm, and a small vision transformer. Each is pretrained
on 1,500 digits of MNIST-5k and fine-tuned on data set A (1,750 others) and B (1,000 of scikit-learn's digits), clean
and with each of 19 corruptions at severity 5. K, alpha and what is done about BatchNorm are chosen on 500 validation
images of A; what is reported is of 1,250 test images of A and 797 of B.

Checkpoints, corrupted images and what was found are kept in $WEIGHTLAB_CACHE, or ~/.cache/weightlab: an interrupted
run goes on where it stopped. What the record has is not measured again. All of it takes hours on two cores.

\b
Examples:
  python evals/benchmarks/signatures.py --record evals/benchmarks/results/signatures.json --readme README.md
  python evals/benchmarks/signatures.py --network vgg --seeds 1
"""


@click.command(help=HELP)
@click.option("--network", "networks", multiple=True, type=click.Choice([*NORMS]), help="Just this one; repeatable.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How many.")
@click.option(
    "--more-seeds", default=7, show_default=True, type=click.IntRange(0), help="For gaussian noise against controls."
)
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="JSON with all that comes out; grows.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(
    networks: tuple[str, ...],
    seeds: int,
    more_seeds: int,
    jobs: int,
    record_path: Path | None,
    readme: Path | None,
) -> None:
    """Trains, chooses, scores, reports."""
    if readme:
        replace_between_markers(readme, "signatures", "")  # fails now rather than after hours
    names = corruptions()
    every, more = ([FIRST_SEED + n for n in r] for r in (range(seeds), range(seeds, seeds + more_seeds)))
    record = Record(record_path, "weightlab", "numpy", "torch", "corrupt-tta", "mlxtend", "scikit-learn")
    found: dict[str, Any] = {}
    off: dict[str, Any] = {}
    cache_folder().mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache_folder())))
        running = stack.enter_context(study(names, every, more, jobs, lambda text: click.echo(text, err=True)))
        for network in networks or tuple(NORMS):
            found[network] = record.once(network, running.key, partial(running.network, network))
            check = partial(removal, network, every[0], found[network], work)
            off[network] = record.once(f"{network} comes off", running.key, check)
        sizes_of = record.once("sizes", source_id(_signature_files), partial(sizes, work))
    text = report(
        {
            **record.conditions(),
            "seeds": every,
            "more_seeds": more,
            "networks": found,
            "sizes": sizes_of,
            "comes_off": off,
        }
    )
    click.echo(text)
    if readme:
        readme.write_text(replace_between_markers(readme, "signatures", text))


if __name__ == "__main__":
    main()
