"""`weightlab inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("path", type=options.operand)
@click.option("--base", type=options.operand, help="A patch's base: gives relative norms, and those of exact patches.")
@click.option("--layers/--tensors", default=True, help="A row a layer, or a row a tensor.  [default: layers]")
@click.option("--plot", "picture", type=Path, metavar="FILE.png", help="Draw where the weights changed.")
@click.option("--no-norms", is_flag=True, help="Read headers only.")
@options.renames("Rename prefixes of the patch's tensor names to those of --base; may be repeated.")
@options.key
@options.dry_run(options.DRY_READ)
@options.wait
@options.trust_remote_code
@options.common
def command(
    common: Common,
    path: str,
    base: str | None,
    layers: bool,
    picture: Path | None,
    no_norms: bool,
    renames: dict[str, str] | Literal["auto"],
    key: str | None,
    dry_run: bool,
    wait: float,
) -> None:
    """Show what a checkpoint or a patch holds, layer by layer, with norms.

    \b
    Example:
      weightlab inspect change.safetensors --base model/ --plot change.png
      weightlab inspect model/ --tensors --no-norms
    """
    import weightlab as wl
    from weightlab_cli.reports import show_facts, show_layers, show_reading, show_tensors

    output = common.output
    if picture is not None:
        from weightlab.ops.plot import check_picture, plot

        check_picture(picture)
    with common.resources() as resources:
        if dry_run:
            places = [path, *([] if base is None else [base])]
            sizes = [wl.inspect(p, key=key, norms=False, wait=wait, resources=resources) for p in places]
            show_reading(output, sizes, resources)
            return
        found = wl.inspect(
            path, base=base, renames=renames, key=key, norms=not no_norms, wait=wait, resources=resources
        )
    if picture is not None:
        plot(found, picture)
    output.result(found)
    show_facts(output, found)
    (show_layers if layers else show_tensors)(output, found)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    output.line(f"{len(found.tensors)} tensors ({kinds}), {found.parameters:,} parameters, {size(found.bytes)}")
    for note in found.notes:
        output.line(note)
    if picture is not None:
        output.line(f"picture: {picture}")
