"""`weightlab signature`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("pretrained", type=options.operand)
@click.argument("clean", type=options.operand)
@click.argument("robust", type=options.operand)
@options.out("The patch: NAME.safetensors, or a folder that is sharded at 5 GB.", required=True)
@click.option(
    "--layers",
    multiple=True,
    metavar="first:K|GLOB",
    help="The first K layers, or globs over names of layers and tensors; may be repeated.  [default: all]",
)
@click.option(
    "--order",
    "units",
    multiple=True,
    metavar="NAME",
    help="The layers in order, each by the beginning of its tensors' names; repeat for each.",
)
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="A Python function that makes the network: its order of layers.  [default: by config.json, else names]",
)
@click.option(
    "--project",
    type=click.Choice(["tensor", "layer", "model"]),
    default="tensor",
    show_default=True,
    help="What one projection is made over.",
)
@click.option(
    "--norm",
    default="keep",
    show_default=True,
    metavar="MODE",
    help="Layers with running statistics: keep, robust (the robust model's), blend:SHARE (part of the way) or "
    "recalibrate (robust, and the statistics measured on --data).",
)
@click.option("--data", metavar="DATA", help="For --norm recalibrate: images as for `weightlab eval images`.")
@click.option("--corruption", metavar="NAME", help="Corrupt them at severity 5; leave it out when they are already.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many images.")
@options.encode
@options.renames("Rename prefixes of the other two's tensor names to CLEAN's; may be repeated.")
@options.key
@click.option("--base-name", metavar="ORG/NAME", help="What CLEAN is called on the Hub; kept in the header.")
@click.option("--revision", help="CLEAN's revision; kept in the header.")
@options.licence
@options.notes
@options.allow_nonfinite
@options.dry_run(options.DRY_PATCH)
@options.wait
@options.trust_remote_code
@options.common
def command(
    common: Common,
    pretrained: str,
    clean: str,
    robust: str,
    out: Path,
    model: str | None,
    data: str | None,
    corruption: str | None,
    limit: int | None,
    dry_run: bool,
    **chosen: Any,
) -> None:
    """Take the Robust Weight Signature of a model as a patch.

    ROBUST was trained on corrupted data and CLEAN on clean data, both from PRETRAINED. The signature is what ROBUST
    changed, less what points the way that CLEAN went. It fits CLEAN and models like it, at any scale.

    \b
    Example:
      weightlab signature pretrained/ clean/ noisy/ -o noise.safetensors --layers first:6 --encode quantized:8
      weightlab signature pretrained/ clean/ noisy/ -o noise.safetensors --norm recalibrate --data noisy-photos/
      weightlab apply clean/ noise.safetensors --in-place
    """
    import weightlab as wl
    from weightlab.files.atomic import refuse_existing
    from weightlab.networks.made import order_of
    from weightlab.ops.inspect import inspect
    from weightlab.ops.operands import reading
    from weightlab_cli.reports import show_layers, show_patch

    refuse_existing(out)
    chosen["encode"] = chosen["encode"] or "dense"
    if not chosen["units"]:
        with reading(clean, key=chosen["key"], wait=chosen["wait"]) as source:
            chosen["order"] = order_of(clean, source.specs, model)
    if (chosen["norm"] == "recalibrate") != (data is not None):
        raise UsageError("--norm recalibrate and --data go together", "give both or neither")
    with common.resources() as resources:
        if data is not None:
            from weightlab_evals.images.statistics import measured

            before = wl.signature(pretrained, clean, robust, resources=resources, **(chosen | {"norm": "robust"}))
            chosen["statistics"] = measured(clean, before, data, corruption, model, limit, chosen["key"])
        patch = wl.signature(pretrained, clean, robust, None if dry_run else out, resources=resources, **chosen)
    found = inspect(patch)
    show_layers(common.output, found)
    show_patch(common.output, str(out), found, resources, dry_run=dry_run)
