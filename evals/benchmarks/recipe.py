"""Runs a recipe of manifests/: models of the Hub, and what a paper found with them; --help says how."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from weightlab_evals.recipes import read_recipe, run_recipe

from weightlab.errors import WeightlabError


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="A folder for what is made; it goes on.")
@click.option("--local", multiple=True, metavar="NAME=PATH", help="A model that is on the disk; repeatable.")
@click.option("--limit", type=click.IntRange(1), help="Only so many questions of each task.")
@click.option("--include-path", type=click.Path(exists=True, path_type=Path), help="Tasks of your own for lm_eval.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write what came out.")
def main(
    recipe: Path,
    work: Path,
    local: tuple[str, ...],
    limit: int | None,
    include_path: Path | None,
    json_path: Path | None,
) -> None:
    """Fetch a recipe's models, do what it says, score the outcome with lm_eval, and print the paper's figures beside.

    Models of 8 billion parameters want 16 GB of disk each, as much memory or a GPU, and hours.

    \b
    Examples:
      python evals/benchmarks/recipe.py manifests/transfer/llama-3.0-to-3.1.yaml --work llama
      python evals/benchmarks/recipe.py manifests/transfer/llama-3.0-to-3.1.yaml --work llama \\
        --local target_base=/models/llama-3.1-8b --limit 100
    """
    try:
        given = {}
        for each in local:
            name, found, path = each.partition("=")
            if not found:
                raise click.UsageError(f"--local {each}: write NAME=PATH")
            given[name] = Path(path)
        read = read_recipe(recipe)
        scores = run_recipe(read, work, given, lambda text: click.echo(text, err=True), limit, include_path)
    except WeightlabError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{read.about}\n\n| task | row | found, % | the paper's, % |\n|---|---|---:|---:|")
    for score in scores:
        click.echo(f"| {score.task} | {score.row} | {score.found:.1f} | {score.paper} |")
    if json_path:
        json_path.write_text(json.dumps({"schema_version": 1, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
