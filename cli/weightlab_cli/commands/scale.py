"""`weightlab scale`."""

from __future__ import annotations

import math
from typing import Any

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _NumbersLast(click.Command):
    """Takes `-1` for the number that it is, and not for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" not in args:
            numbers = [a for a in args if a.startswith("-") and _number(a) is not None]
            args = [a for a in args if a not in numbers] + ["--", *numbers]
        return super().parse_args(ctx, args)


@click.command(cls=_NumbersLast)
@click.argument("model", type=options.operand)
@click.argument("patch", type=options.operand, metavar="PATCH[@SCALE]")
@click.argument("scale", required=False)
@options.links
@options.allow_nonfinite
@options.dry_run(options.DRY_CHANGE)
@options.wait
@options.common
def command(common: Common, model: str, patch: str, scale: str | None, **chosen: Any) -> None:
    """Change the strength of a patch that is on a model.

    PATCH is the patch's file, what the file was called, or the beginning of its id. The scale follows it, after a space
    or after @.

    \b
    Example:
      weightlab scale model/ math.safetensors 0.5
      weightlab scale model/ math.safetensors -1
      weightlab scale model/ math.safetensors@0.5
    """
    import weightlab as wl
    from weightlab.ops.operands import parse_patch
    from weightlab_cli.reports import show_outcome

    if scale is None:
        patch, factor = parse_patch(patch)
        if factor is None:
            raise UsageError(f"no scale for {patch}", "give a number after it, for example 0.5 or -1")
    else:
        factor = _number(scale)
        if factor is None or not math.isfinite(factor):
            raise UsageError(f"{scale!r} is no scale", "give a finite number, for example 0.5 or -1")
    with common.resources() as resources:
        outcome = wl.scale(model, patch, factor, resources=resources, **chosen)
    show_outcome(common.output, outcome, resources)
