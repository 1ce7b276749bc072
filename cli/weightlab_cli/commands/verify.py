"""`weightlab verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from weightlab.errors import WeightlabError
from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import Output, size

if TYPE_CHECKING:
    from weightlab.ops.verify import Verified


@click.command()
@click.argument("paths", nargs=-1, required=True, type=options.operand, metavar="PATH...")
@click.option("--base", type=options.operand, help="For patches: also check that this is what they were taken from.")
@options.key
@options.dry_run(options.DRY_READ)
@options.wait
@options.common
def command(
    common: Common, paths: tuple[str, ...], base: str | None, key: str | None, dry_run: bool, wait: float
) -> None:
    """Read patches and checkpoints whole and check every digest that is known of them.

    A checkpoint's fingerprint depends on its tensors alone, not on how they lie in files.

    \b
    Example:
      weightlab verify math.safetensors chat.safetensors --base model/
      weightlab verify model/
    """
    import weightlab as wl

    output = common.output
    if dry_run:
        from weightlab_cli.reports import show_reading

        with common.resources() as resources:
            places = [*paths, *([] if base is None else [base])]
            sizes = [wl.inspect(p, key=key, norms=False, wait=wait, resources=resources) for p in places]
        show_reading(output, sizes, resources)
        return
    found: list[Verified] = []
    errors: list[WeightlabError] = []
    with common.resources() as resources:
        for path in paths:
            try:
                found.append(wl.verify(path, base=base, key=key, wait=wait, resources=resources))
            except WeightlabError as error:
                if len(paths) == 1:
                    raise
                errors.append(error)
    if not errors:
        output.result({"verified": found})
    for verified in found:
        _show(output, verified)
    if errors:
        raise _together(errors, len(paths))


def _show(output: Output, found: Verified) -> None:
    output.line(f"{found.path}: whole ({found.tensors} tensors, {size(found.bytes)})")
    output.line(f"{'id' if found.kind == 'patch' else 'fingerprint'}: {found.identity}")
    if found.clean is not None:
        output.line(f"without its patches: {found.clean}")
    for note in found.notes:
        output.line(note)


def _together(errors: list[WeightlabError], paths: int) -> WeightlabError:
    """One error with all of several; its exit code is that of the first."""
    offenders = [line for e in errors for line in (e.message, *(f"  {o}" for o in e.offenders))]
    remedies = dict.fromkeys(e.remedy for e in errors if e.remedy)
    together = type(errors[0])(f"{len(errors)} of {paths} did not pass", "; ".join(remedies), offenders)
    together.exit_code = errors[0].exit_code
    return together
