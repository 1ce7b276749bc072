"""`weightlab remove`."""

from __future__ import annotations

from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("model", type=options.operand)
@click.argument("patches", nargs=-1, type=options.operand, metavar="[PATCH]...")
@click.option("--all", "everything", is_flag=True, help="Take all patches off.")
@click.option("--forget", "drop_record", is_flag=True, help="Only forget what is on; the files stay as they are.")
@options.links
@options.allow_nonfinite
@options.dry_run(options.DRY_CHANGE)
@options.wait
@options.common
def command(common: Common, model: str, patches: tuple[str, ...], **chosen: Any) -> None:
    """Take patches off a model again, bit for bit.

    PATCH is the patch's file, what the file was called, or the beginning of its id: the file may be gone. The order
    does not matter; the last one leaves the first bytes of the model and no trace.

    \b
    Example:
      weightlab remove model/ math.safetensors
      weightlab remove model/ --all
    """
    import weightlab as wl
    from weightlab_cli.reports import show_outcome

    with common.resources() as resources:
        outcome = wl.remove(model, list(patches), resources=resources, **chosen)
    show_outcome(common.output, outcome, resources)
