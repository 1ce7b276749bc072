"""`weightlab identify`."""

from __future__ import annotations

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("patch", type=options.operand)
@click.argument("library", nargs=-1, required=True, type=options.operand)
@click.option("--base", type=options.operand, help="The base of exact patches.")
@options.include
@options.exclude
@options.key
@options.dry_run(options.DRY_READ)
@options.wait
@options.trust_remote_code
@options.common
def command(
    common: Common,
    patch: str,
    library: tuple[str, ...],
    base: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    key: str | None,
    dry_run: bool,
    wait: float,
) -> None:
    """Say which patches of a library a patch is most like, by cosine.

    LIBRARY is patches, or folders of them.

    \b
    Example:
      weightlab identify unknown.safetensors signatures/
    """
    import weightlab as wl
    from weightlab.ops.similarity import patches_in
    from weightlab_cli.reports import show_reading

    output = common.output
    with common.resources() as resources:
        if dry_run:
            places = [patch, *(entry for given in library for entry in patches_in(given))]
            show_reading(
                output, [wl.inspect(p, norms=False, wait=wait, resources=resources) for p in places], resources
            )
            return
        found = wl.identify(
            patch,
            list(library),
            base=base,
            include=include,
            exclude=exclude,
            key=key,
            wait=wait,
            resources=resources,
        )
    output.result({"patch": patch, "matches": found})
    rows = [[m.label, f"{m.cosine:+.4f}", str(m.shared_tensors)] for m in found]
    output.table(["most like", "#cosine", "#shared tensors"], rows)
