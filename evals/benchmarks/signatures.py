"""Measures Robust Weight Signatures on real images; --help says what and how."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from _environment import cache_folder, machine, versions
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
run goes on where it stopped. All of it takes hours on two cores.

\b
Examples:
  python evals/benchmarks/signatures.py --json signatures.json --readme README.md
  python evals/benchmarks/signatures.py --network vgg --seeds 1
"""


@click.command(help=HELP)
@click.option("--network", "networks", multiple=True, type=click.Choice([*NORMS]), help="Just this one; repeatable.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="How many.")
@click.option(
    "--more-seeds", default=7, show_default=True, type=click.IntRange(0), help="For gaussian noise against controls."
)
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that came out.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(
    networks: tuple[str, ...],
    seeds: int,
    more_seeds: int,
    jobs: int,
    json_path: Path | None,
    readme: Path | None,
) -> None:
    """Trains, chooses, scores, reports."""
    if readme:
        replace_between_markers(readme, "signatures", "")  # fails now rather than after hours
    names = corruptions()
    every, more = ([FIRST_SEED + n for n in r] for r in (range(seeds), range(seeds, seeds + more_seeds)))
    found: dict[str, Any] = {}
    with study(names, every, more, jobs, lambda text: click.echo(text, err=True)) as running:
        running.images()
        for network in networks or tuple(NORMS):
            found[network] = running.network(network)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        sizes_of = sizes(Path(folder))
        off = {network: removal(network, every[0], found[network], Path(folder)) for network in found}
    result = {
        "schema_version": 1,
        "machine": machine(cache_folder()),
        "versions": versions("weightlab", "numpy", "torch", "corrupt-tta", "mlxtend", "scikit-learn"),
        "seeds": every,
        "more_seeds": more,
        "networks": found,
        "sizes": sizes_of,
        "comes_off": off,
    }
    text = report(result)
    click.echo(text)
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if readme:
        readme.write_text(replace_between_markers(readme, "signatures", text))


if __name__ == "__main__":
    main()
