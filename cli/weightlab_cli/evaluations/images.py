"""`weightlab eval images`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightlab_cli import options
from weightlab_cli.evaluations._scales import scales_of
from weightlab_cli.options import Common
from weightlab_cli.output import Bar, Output

if TYPE_CHECKING:
    from weightlab_evals.images.evaluate import Evaluation


@click.command()
@click.argument("model", type=options.operand)
@click.option(
    "--data", required=True, metavar="DATA", help="Class folders, .npz, CIFAR-10-C, ImageNet-C, digits, mnist5k."
)
@click.option(
    "--patch", "patches", multiple=True, metavar="PATCH[@SCALE]", help="On the model, all together; repeatable."
)
@click.option(
    "--scales", default="1", show_default=True, callback=scales_of, help="Factors of the patches' scales, by comma."
)
@click.option(
    "--corruption", "names", multiple=True, metavar="NAME", help="Repeatable; none: clean only.  [default: all]"
)
@click.option("--severity", "severities", multiple=True, type=click.IntRange(1, 5), help="Repeatable.  [default: 5]")
@click.option("--seed", default=0, show_default=True, help="Of the corruptions' noise.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--model", "reference", metavar="MODULE:FUNCTION", help="A Python function that makes the network.")
@options.key
@click.option("-o", "--out", type=Path, metavar="FILE.json", help="Write all that came out, predictions too.")
@click.option("--plot", "picture", type=Path, metavar="FILE.png", help="Draw accuracy against scale.")
@options.dry_run("Open everything, say how many images would be predicted; predict none.")
@options.trust_remote_code
@options.common
def command(
    common: Common,
    model: str,
    data: str,
    patches: tuple[str, ...],
    scales: tuple[float, ...],
    names: tuple[str, ...],
    severities: tuple[int, ...],
    seed: int,
    limit: int | None,
    batch: int,
    reference: str | None,
    key: str | None,
    out: Path | None,
    picture: Path | None,
    dry_run: bool,
) -> None:
    """Score an image classifier on clean and corrupted images.

    MODEL is a folder of transformers or timm, or with --model any checkpoint of that network. Patches are put on in
    memory and nothing is written. The first row is the model without them, and what mean corruption errors are
    relative to.

    \b
    Example:
      weightlab eval images vit/ --data photos/ --patch noise.safetensors@0.8
      weightlab eval images cnn.safetensors --model nets:vgg --data digits --corruption fog --scales 0,0.5,1
    """
    from weightlab_evals.images.data import open_images
    from weightlab_evals.images.evaluate import evaluate
    from weightlab_evals.images.models import open_classifier
    from weightlab_evals.images.plot import plot_scales

    from weightlab.files.atomic import refuse_existing
    from weightlab.ops.plot import check_picture
    from weightlab.runtime.patched import patches_for

    if out is not None:
        refuse_existing(out)
    if picture is not None:
        check_picture(picture)
    images = open_images(data).first(limit)
    classifier = open_classifier(model, reference, key)
    chosen = None if not names else [] if names == ("none",) else list(names)
    if dry_run:
        classifier.places(images)
        opened = [patch.id for patch in patches_for(classifier.module, list(patches))]
        common.output.result({"dry_run": True, "images": len(images), "patches": opened})
        common.output.line(f"{len(images)} images, {len(opened)} patches; nothing was predicted (dry run)")
        return
    with Bar(not (common.output.json or common.output.quiet)) as bar, common.resources() as resources:
        found = evaluate(
            classifier,
            images,
            list(patches),
            scales=scales,
            names=chosen,
            severities=severities or (5,),
            seed=seed,
            batch=batch,
            label=model,
            progress=bar.report,
            resources=replace(resources, progress=None),  # the bar is for images
        )
    if out is not None:
        found.save(out)
    if picture is not None:
        plot_scales(found, picture)
    common.output.result(found)
    _show(common.output, found)


def _show(output: Output, found: Evaluation) -> None:
    heads = ["without patches", *(f"scale {row.scale:g}" for row in found.rows[1:])]
    cells = []
    for index, cell in enumerate(found.rows[0].cells):
        name = cell["corruption"] + (f" {cell['severity']}" if cell["severity"] else "")
        of_rows = [row.cells[index] for row in found.rows]
        cells.append([name, *(f"{c['accuracy']:.3f} ({c['low']:.3f}–{c['high']:.3f})" for c in of_rows)])
    if found.rows[0].mce is not None:
        cells.append(["mean corruption error", *("" if r.mce is None else f"{r.mce:.3f}" for r in found.rows)])
    output.table(
        ["", *(f"#{head}" for head in heads)], cells, f"{found.images} images of {found.data}: accuracy (95 %)"
    )
