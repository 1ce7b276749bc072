"""`weightlab compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("patches", nargs=-1, required=True, metavar="PATCH[@SCALE]...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="NAME.safetensors, or a folder.")
@click.option("--base", help="The patches' base; exact patches and exact results need it.")
@options.encode
@options.include
@options.exclude
@click.option("--license", help="The patch's licence; kept in the header.")
@click.option("--notes", help="Anything to keep in the header.")
@options.key
@options.wait
@options.common
def command(common: Common, patches: tuple[str, ...], out: Path, **chosen: Any) -> None:
    """Add, scale and negate patches into one.

    \b
    Example:
      weightlab compose math.safetensors@0.5 chat.safetensors@-1 -o both.safetensors
      weightlab compose change.safetensors@-1 --base model/ -o back.safetensors
    """
    import weightlab as wl

    with common.resources() as resources:
        patch = wl.compose(list(patches), out, resources=resources, **chosen)
    errors = [r.error.relative_l2 for r in patch.records.values() if r.error is not None]
    report = {"path": str(out), "id": patch.id, "tensors": len(patch.records), "bytes": patch.nbytes()}
    common.output.result(report | {"largest_relative_error": max(errors, default=0.0)})
    common.output.line(f"{out}: {len(patch.records)} tensors, {size(patch.nbytes())}, id {patch.id[:12]}")
    common.output.line(f"largest relative error of a tensor: {max(errors, default=0.0):.3g}")
