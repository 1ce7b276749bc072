"""`weightlab status`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("model")
@options.wait
@options.common
def command(common: Common, model: str, wait: float) -> None:
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
        found = wl.status(model, wait=wait, resources=resources)
    output.result(found)
    show_stack(output, model, found.patches)
    if found.patches:
        output.line(f"{found.tensors} tensors touched, {size(found.kept_bytes)} of clean bytes kept")
    for note in found.notes:
        output.line(note)
    if not found.intact:
        raise click.exceptions.Exit(5)
