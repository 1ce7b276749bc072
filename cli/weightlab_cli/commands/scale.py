"""`weightlab scale`."""

from __future__ import annotations

import math
from typing import Any

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common


@click.command(context_settings={"ignore_unknown_options": True})  # so that a negative scale is no option
@click.argument("model")
@click.argument("patch")
@click.argument("scale")
@options.links
@options.allow_nonfinite
@options.dry_run
@options.wait
@options.common
def command(common: Common, model: str, patch: str, scale: str, **chosen: Any) -> None:
    """Change the strength of a patch that is on.

    PATCH is the patch's file, what the file was called, or the beginning of its id.

    \b
    Example:
      weightlab scale model/ math.safetensors 0.5
      weightlab scale model/ math.safetensors -1
    """
    import weightlab as wl
    from weightlab_cli.reports import show_outcome

    try:
        factor = float(scale)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UsageError(f"{scale!r} is no scale", "give a finite number, for example 0.5 or -1")
    with common.resources() as resources:
        outcome = wl.scale(model, patch, factor, resources=resources, **chosen)
    show_outcome(common.output, outcome)
