"""`weightlab connectivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("source_base", type=options.operand)
@click.argument("source_tuned", type=options.operand)
@click.argument("target_base", type=options.operand)
@options.include
@options.exclude
@options.renames("Rename prefixes of TARGET_BASE's tensor names to the others'; may be repeated.")
@click.option("--target-tuned", type=options.operand, help="A tune of the target: measure the line to it.")
@click.option("--text", type=Path, metavar="FILE.txt", help="Held-out text for that.")
@click.option("--points", default=11, show_default=True, type=click.IntRange(3), help="On the line.")
@click.option("--limit", type=click.IntRange(2), help="Only the first so many tokens of the text.")
@click.option("--plot", "picture", type=Path, metavar="FILE.png", help="Draw the loss along the line.")
@options.dry_run(options.DRY_READ)
@options.wait
@options.trust_remote_code
@options.common
def command(
    common: Common,
    source_base: str,
    source_tuned: str,
    target_base: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    renames: dict[str, str] | Literal["auto"],
    target_tuned: str | None,
    text: Path | None,
    points: int,
    limit: int | None,
    picture: Path | None,
    dry_run: bool,
    wait: float,
) -> None:
    """Forecast whether a fine-tune will work on another base.

    From the three models alone, before anything is tuned on TARGET_BASE: how far it is from SOURCE_BASE beside how far
    the tune went, and whether the two share their training at all. Where there is a tune of the target already,
    --target-tuned and --text measure what lies between the two tunes.

    \b
    Example:
      weightlab connectivity base-v1/ tuned-v1/ base-v2/
      weightlab connectivity base-v1/ tuned-v1/ base-v2/ --target-tuned tuned-v2/ --text held-out.txt --plot line.png
    """
    import weightlab as wl
    from weightlab_cli.reports import show_reading

    if (target_tuned is None) != (text is None) or (picture is not None and text is None):
        raise UsageError("the loss between two tunes needs both", "give --target-tuned and --text")
    if picture is not None:
        from weightlab.ops.plot import check_picture

        check_picture(picture)
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
            renames=renames,
            wait=wait,
            resources=resources,
        )
    line = None
    if target_tuned is not None and text is not None:
        from weightlab_evals.lm.barrier import barrier, plot_barrier, text_loss

        module, loss = text_loss(source_tuned, text, limit)
        line = barrier(source_base, source_tuned, target_tuned, loss, module, points)
        if picture is not None:
            plot_barrier(line, picture)
    common.output.result(found, words=found.words, barrier=line)
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
    if line is not None:
        part = "" if line.relative is None else f", {line.relative:.3g} of what tuning gained"
        common.output.line(f"loss from tune to tune: {', '.join(f'{value:.4f}' for value in line.losses)} nats a token")
        common.output.line(f"barrier: {line.barrier:.4g}{part}")
