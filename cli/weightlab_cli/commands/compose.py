"""`weightlab compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("patches", nargs=-1, required=True, type=options.operand, metavar="PATCH[@SCALE]...")
@options.out("NAME.safetensors, or a folder that is sharded at 5 GB.", required=True)
@options.method("task_arithmetic")
@click.option("--base", type=options.operand, help="The patches' base; exact patches and exact results need it.")
@options.encode
@options.include
@options.exclude
@options.licence
@options.notes
@options.key
@options.dry_run(options.DRY_PATCH)
@options.wait
@options.trust_remote_code
@options.common
def command(common: Common, patches: tuple[str, ...], out: Path, dry_run: bool, **chosen: Any) -> None:
    """Add, scale and negate patches into one, or merge them by another method.

    \b
    Example:
      weightlab compose math.safetensors@0.5 chat.safetensors@-1 -o both.safetensors
      weightlab compose change.safetensors@-1 --base model/ -o back.safetensors
      weightlab compose a.safetensors b.safetensors@0.5 --method ties --set density=0.2 -o merged.safetensors
    """
    import weightlab as wl
    from weightlab.files.atomic import refuse_existing
    from weightlab.ops.inspect import inspect
    from weightlab_cli.reports import show_patch

    refuse_existing(out)
    with common.resources() as resources:
        patch = wl.compose(list(patches), None if dry_run else out, resources=resources, **chosen)
    show_patch(common.output, str(out), inspect(patch, norms=False), resources, dry_run=dry_run)
