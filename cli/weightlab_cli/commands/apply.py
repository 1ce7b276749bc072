"""`weightlab apply`."""

from __future__ import annotations

from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common


@click.command()
@click.argument("model", type=options.operand)
@click.argument("patches", nargs=-1, type=options.operand, metavar="[PATCH[@SCALE]]...")
@options.out("Write a new checkpoint: a folder, or NAME.safetensors.")
@click.option("--in-place", is_flag=True, help="Change MODEL itself; `weightlab remove` restores it bit for bit.")
@options.include
@options.exclude
@options.renames("Rename prefixes of the patch's tensor names to the model's; may be repeated.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(["added"]),
    help="Take tensors of an adapter that MODEL lacks, such as a head.",
)
@options.experts_layout
@options.key
@options.links
@options.allow_nonfinite
@options.allow_growth
@options.dry_run(options.DRY_CHANGE)
@options.wait
@options.trust_remote_code
@options.common
def command(common: Common, model: str, patches: tuple[str, ...], **chosen: Any) -> None:
    """Put patches on a model: in place, or as a new checkpoint.

    Every touched tensor becomes round(clean + sum of scale × delta), computed from its clean bytes. Several patches may
    be on at a time; their order does not matter. A negative scale takes a behaviour away. Without a patch, --out gets a
    copy of the model as safetensors. PEFT adapters are patches too; where one has more tokens than the model, its
    tokenizer comes along.

    \b
    Example:
      weightlab apply model/ math.safetensors --in-place
      weightlab apply model/ math.safetensors@0.7 chat.safetensors@-0.2 -o mixed/
      weightlab apply model/ adapter/ -o classifier/ --allow added
      weightlab apply pytorch_model.bin -o model.safetensors
    """
    import weightlab as wl
    from weightlab_cli.reports import show_outcome

    with common.resources() as resources:
        outcome = wl.apply(model, list(patches), resources=resources, **chosen)
    show_outcome(common.output, outcome, resources)
