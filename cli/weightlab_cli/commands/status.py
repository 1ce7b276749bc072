"""`weightlab status`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("model", type=options.operand)
@options.dry_run("Look only: an interrupted change is reported (exit code 5) and not ended.")
@options.wait
@options.common
def command(common: Common, model: str, dry_run: bool, wait: float) -> None:
    """Say which patches are on a model, and end a change that was interrupted.

    Exit code 5 when something else changed the files while patches were on.

    \b
    Example:
      weightlab status model/
    """
    import weightlab as wl
    from weightlab_cli.reports import show_stack

    output = common.output
    with common.resources() as resources:
        found = wl.status(model, dry_run=dry_run, wait=wait, resources=resources)
    output.result(found)
    show_stack(output, model, found.patches)
    if found.patches:
        output.line(f"{found.tensors} tensors touched, {size(found.kept_bytes)} of clean bytes kept")
    for note in found.notes:
        output.line(note)
    if not found.intact:
        raise click.exceptions.Exit(5)
