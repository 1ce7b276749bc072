"""`weightlab transfer`."""

from __future__ import annotations

from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("source_base", type=options.operand)
@click.argument("source_tuned", type=options.operand)
@click.argument("target_base", type=options.operand)
@options.out("Where the new checkpoint goes: a folder, or NAME.safetensors.", required=True)
@click.option("--scale", type=float, default=1.0, show_default=True, help="What the difference is multiplied by.")
@click.option(
    "--rows",
    type=click.Choice(["by-token", "by-id"]),
    help="How rows of embeddings are matched.  [default: by token where there are tokenizers]",
)
@click.option("--forecast/--no-forecast", default=True, help="Say whether it is expected to work.  [default: yes]")
@options.include
@options.exclude
@options.renames("Rename prefixes of TARGET_BASE's tensor names to the others'; may be repeated.")
@options.allow_nonfinite
@options.dry_run(options.DRY_CHANGE)
@options.wait
@options.trust_remote_code
@options.common
def command(common: Common, source_base: str, source_tuned: str, target_base: str, **chosen: Any) -> None:
    """Move a fine-tune (or chat vector) to another base release.

    Writes TARGET_BASE + scale × (SOURCE_TUNED − SOURCE_BASE). SOURCE_TUNED may be a PEFT adapter. Configuration and
    generation settings are the target's; what the tune changed of chat template and special tokens comes along. Rows of
    embeddings go by token.

    \b
    Example:
      weightlab transfer base-v1/ tuned-v1/ base-v2/ -o tuned-v2/
      weightlab transfer base-v1/ adapter/ base-v2/ -o tuned-v2/ --scale 0.8
    """
    import weightlab as wl
    from weightlab_cli.reports import show_outcome

    with common.resources() as resources:
        done = wl.transfer(source_base, source_tuned, target_base, resources=resources, **chosen)
    show_outcome(common.output, done, resources)
    if done.rows is not None:
        rows = done.rows
        counts = [[str(n) for n in (rows.matched, len(rows.added), rows.left, rows.padding, rows.dropped)]]
        heads = ["#matched", "#added", "#left", "#padding", "#not in the target"]
        common.output.table(heads, counts, f"rows of {', '.join(rows.tensors)}")
    for name in done.carried:
        common.output.line(f"from the tune: {name}")
    if done.forecast is not None:
        common.output.line(f"forecast: {done.forecast.forecast}; {done.forecast.words}")
    for name in done.kept:
        common.output.line(f"as in the target: {name} (integers, which the tune changed)")
