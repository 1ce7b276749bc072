"""`weightlab diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab.errors import UsageError
from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import printable, size

_FOR_A_PATCH = ("encode", "base_name", "revision", "license", "notes", "allow_nonfinite", "dry_run")


@click.command()
@click.argument("base", type=options.operand)
@click.argument("tuned", type=options.operand)
@options.out("The patch: NAME.safetensors, or a folder that is sharded at 5 GB.")
@options.encode
@options.include
@options.exclude
@options.renames("Rename prefixes of TUNED's tensor names to BASE's; may be repeated.")
@click.option(
    "--allow",
    type=click.Choice(["added", "removed", "rows"]),
    multiple=True,
    help="A difference in structure that is meant; may be repeated.",
)
@options.key
@click.option("--base-name", metavar="ORG/NAME", help="What the base is called on the Hub; kept in the header.")
@click.option("--revision", help="The base's revision; kept in the header.")
@options.licence
@options.notes
@options.allow_nonfinite
@click.option("--exit-code", is_flag=True, help="Without -o: end with 1 when the models differ, 0 when they do not.")
@options.dry_run(options.DRY_PATCH)
@options.wait
@options.common
def command(common: Common, base: str, tuned: str, out: Path | None, exit_code: bool, **chosen: Any) -> None:
    """Take the difference of two models as a patch, or just show it.

    The patch takes BASE to TUNED. Without -o nothing is written: a table says where the two differ, and with
    --exit-code the exit code says whether (1 otherwise means a bug).

    \b
    Example:
      weightlab diff base/ tuned/ -o change.safetensors
      weightlab diff base/ tuned/ -o small.safetensors --encode low_rank:16 --encode '*norm*=dense:fp32'
      weightlab diff base/ tuned/ --exit-code --quiet
    """
    if out is None:
        _compare(common, base, tuned, exit_code, chosen)
        return
    if exit_code:
        raise UsageError("--exit-code is for a comparison", "leave out -o")
    import weightlab as wl
    from weightlab.files.atomic import refuse_existing
    from weightlab.ops.inspect import inspect
    from weightlab_cli.reports import show_patch

    refuse_existing(out)
    dry_run = chosen.pop("dry_run")
    with common.resources() as resources:
        patch = wl.diff(base, tuned, None if dry_run else out, resources=resources, **chosen)
    if not common.output.quiet and patch.header.notes and patch.header.notes != chosen["notes"]:
        click.echo(printable(patch.header.notes), err=True)
    show_patch(common.output, str(out), inspect(patch, norms=False), resources, dry_run=dry_run)


def _compare(common: Common, base: str, tuned: str, exit_code: bool, chosen: dict[str, Any]) -> None:
    given = [f"--{n.replace('_', '-')}" for n in _FOR_A_PATCH if chosen.pop(n)]
    if given:
        raise UsageError("these options are for a patch", "say where it goes with -o", given)
    from weightlab.ops.compare import difference
    from weightlab_cli.reports import show_layers

    with common.resources() as resources:
        found = difference(base, tuned, resources=resources, **chosen)
    common.output.result(found)
    show_layers(common.output, found)
    facts = found.facts
    if "renames" in facts:
        from weightlab.tensors.naming import options as typed

        common.output.line(f"names of the tuned model were mapped: {typed(facts['renames'])}")
    for what in ("added", "removed"):
        for name in facts[what]:
            common.output.line(f"{what}: {name}")
    common.output.line(f"{facts['changed']} of {facts['compared']} tensors differ, {size(found.bytes)}")
    if exit_code and (facts["changed"] or facts["added"] or facts["removed"]):
        raise click.exceptions.Exit(1)
