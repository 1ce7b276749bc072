"""`weightlab verify`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import size


@click.command()
@click.argument("path")
@click.option("--base", help="For a patch: also check that this checkpoint is the one it was taken from.")
@options.key
@options.wait
@options.common
def command(common: Common, path: str, base: str | None, key: str | None, wait: float) -> None:
    """Read a patch or a checkpoint whole and check every digest that is known of it.

    A checkpoint's fingerprint depends on its tensors alone, not on how they lie in files.

    \b
    Example:
      weightlab verify math.safetensors --base model/
      weightlab verify model/
    """
    import weightlab as wl

    output = common.output
    with common.resources() as resources:
        found = wl.verify(path, base=base, key=key, wait=wait, resources=resources)
    output.result(found)
    output.line(f"{path}: whole ({found.tensors} tensors, {size(found.bytes)})")
    output.line(f"{'id' if found.kind == 'patch' else 'fingerprint'}: {found.identity}")
    if found.clean is not None:
        output.line(f"without its patches: {found.clean}")
    for note in found.notes:
        output.line(note)
