"""`weightlab recycle`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("plan", type=options.operand, metavar="PLAN.yaml")
@options.dry_run("Check the plan, say which steps would be run; run none.")
@options.trust_remote_code
@options.common
def command(common: Common, plan: str, dry_run: bool) -> None:
    """Fine-tune every base release from what the last tune learned.

    The plan names the releases, oldest first, and your own training command, in which {start} and {out} are put in.
    A run that was cut off goes on where it stopped; between steps only differences are kept.

    \b
    Example plan:
      bases: [release-1, release-2, release-3]
      train: python tune.py --from {start} --to {out}
      work: recycling
      result: tuned-3
      algorithm: iterative     # or direct: from a plain tune of the release before
      scale: 1.0

    \b
    Example:
      weightlab recycle plan.yaml
    """
    import weightlab as wl

    silent = common.output.json or common.output.quiet
    with common.resources() as resources:
        done = wl.recycle(
            plan, dry_run=dry_run, say=(lambda text: None) if silent else common.output.line, resources=resources
        )
    common.output.result(done)
    would = "would be run" if dry_run else "run"
    common.output.line(f"{len(done.found)} steps found, {len(done.ran)} {would}: {', '.join(done.ran)}")
    if not dry_run:
        common.output.line(f"{done.result}: the tuned model of the last release")
