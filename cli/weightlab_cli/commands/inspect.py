"""`weightlab inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("path")
@click.option("--base", help="For a patch: its base. Gives relative norms, and those of exact patches.")
@click.option("--tensors", is_flag=True, help="A row a tensor instead of a row a layer.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw where the weights changed: FILE.png.")
@click.option("--no-norms", is_flag=True, help="Read headers only.")
@options.key
@options.wait
@options.common
def command(
    common: Common,
    path: str,
    base: str | None,
    tensors: bool,
    picture: Path | None,
    no_norms: bool,
    key: str | None,
    wait: float,
) -> None:
    """Show what a checkpoint or a patch holds, with norms per layer.

    \b
    Example:
      weightlab inspect change.safetensors --base model/ --plot change.png
      weightlab inspect model/ --tensors --no-norms
    """
    import weightlab as wl
    from weightlab_cli.reports import show_facts, show_layers, show_tensors

    output = common.output
    with common.resources() as resources:
        found = wl.inspect(path, base=base, key=key, norms=not no_norms, wait=wait, resources=resources)
    if picture is not None:
        from weightlab.ops.plot import plot

        plot(found, picture)
    output.result(found)
    show_facts(output, found)
    (show_tensors if tensors else show_layers)(output, found)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    output.line(f"{len(found.tensors)} tensors ({kinds}), {found.parameters:,} parameters, {size(found.bytes)}")
    for note in found.notes:
        output.line(note)
    if picture is not None:
        output.line(f"picture: {picture}")
