"""`weightlab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("operands", nargs=-1, required=True, type=options.operand, metavar="A B...")
@click.option("--base", type=options.operand, help="Compare changes of this base; exact patches need it.")
@options.include
@options.exclude
@options.renames("Rename prefixes of the operands' tensor names to those of --base or A; may be repeated.")
@click.option("--plot", "picture", type=Path, metavar="FILE.png", help="Draw the cosines, and norms by depth.")
@options.key
@options.dry_run(options.DRY_READ)
@options.wait
@options.trust_remote_code
@options.common
def command(
    common: Common,
    operands: tuple[str, ...],
    base: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    renames: dict[str, str] | Literal["auto"],
    picture: Path | None,
    key: str | None,
    dry_run: bool,
    wait: float,
) -> None:
    """Show how alike patches or checkpoints are: cosines, norms, where in depth.

    Patches are compared by what they change. Checkpoints are compared by their change of --base, or without it as they
    are. What one lacks counts as zero there.

    \b
    Example:
      weightlab compare noise.safetensors blur.safetensors --plot alike.png
      weightlab compare math/ chat/ code/ --base base/
    """
    import weightlab as wl
    from weightlab_cli.reports import show_comparison, show_reading

    if len(operands) < 2:
        raise UsageError("there is nothing to compare with", "give two or more")
    if picture is not None:
        from weightlab.ops.plot import check_picture
        from weightlab.ops.plot_comparison import plot_comparison

        check_picture(picture)
    with common.resources() as resources:
        if dry_run:
            places = [*operands, *([] if base is None else [base])]
            show_reading(
                common.output,
                [wl.inspect(p, key=key, norms=False, wait=wait, resources=resources) for p in places],
                resources,
            )
            return
        found = wl.compare(
            list(operands),
            base=base,
            include=include,
            exclude=exclude,
            renames=renames,
            key=key,
            wait=wait,
            resources=resources,
        )
    if picture is not None:
        plot_comparison(found, picture)
    show_comparison(common.output, found)
    if picture is not None:
        common.output.line(f"picture: {picture}")
