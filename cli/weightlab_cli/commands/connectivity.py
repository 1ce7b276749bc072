"""`weightlab connectivity`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("source_base", type=options.operand)
@click.argument("source_tuned", type=options.operand)
@click.argument("target_base", type=options.operand)
@options.include
@options.exclude
@options.dry_run(options.DRY_READ)
@options.wait
@options.common
def command(
    common: Common,
    source_base: str,
    source_tuned: str,
    target_base: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    wait: float,
) -> None:
    """Forecast whether a fine-tune will work on another base.

    From the three models alone, before anything is tuned on TARGET_BASE: how far it is from SOURCE_BASE beside how far
    the tune went, and whether the two share their training at all.

    \b
    Example:
      weightlab connectivity base-v1/ tuned-v1/ base-v2/
    """
    import weightlab as wl
    from weightlab_cli.reports import show_reading

    with common.resources() as resources:
        if dry_run:
            places = [source_base, source_tuned, target_base]
            show_reading(
                common.output, [wl.inspect(p, norms=False, wait=wait, resources=resources) for p in places], resources
            )
            return
        found = wl.connectivity(
            source_base,
            source_tuned,
            target_base,
            include=include,
            exclude=exclude,
            wait=wait,
            resources=resources,
        )
    common.output.result(found, words=found.words)
    rows = [
        [
            link.layer,
            f"{link.distance:.3g}",
            f"{link.change:.3g}",
            "–" if link.ratio is None else f"{link.ratio:.2f}",
            f"{link.cosine:+.4f}",
            f"{link.along:+.4f}",
        ]
        for link in [*found.layers, found.whole]
    ]
    heads = ["layer", "#target − base", "#tuned − base", "#ratio", "#cos bases", "#cos changes"]
    common.output.table(heads, rows, "relative to the base")
    for name in found.left_out:
        common.output.line(f"left out: {name} (the target numbers its tokens otherwise)")
    common.output.line(f"{found.forecast}: {found.words}")
