"""`weightlab lora`: between patches and PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common

_rank = click.option("--rank", type=click.IntRange(min=1), help="The rank of what has to be factorised.")
_energy = click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="The share of ‖Δ‖² to keep.")
_vectors = click.option("--vectors", is_flag=True, help="Keep what LoRA cannot hold (norms, biases) as values.")
_vllm = click.option("--vllm", is_flag=True, help="As vLLM loads it: linear layers only, one rank.")
_base_name = click.option("--base-name", metavar="ORG/NAME", help="What the model is called; kept in the adapter.")


@click.group()
def command() -> None:
    """Turn fine-tunes and patches into PEFT LoRA adapters, and adapters into patches.

    \b
    Example:
      weightlab lora extract base/ tuned/ -o adapter/ --rank 32
      weightlab lora export change.safetensors base/ -o adapter/
      weightlab lora import adapter/ base/ -o change.safetensors
    """


@command.command()
@click.argument("base", type=options.operand)
@click.argument("tuned", type=options.operand)
@options.out("The adapter: a new folder.", required=True)
@_rank
@_energy
@_vectors
@_vllm
@_base_name
@options.include
@options.exclude
@options.renames("Rename prefixes of TUNED's tensor names to BASE's; may be repeated.")
@options.dry_run(options.DRY_MADE)
@options.wait
@options.trust_remote_code
@options.common
def extract(common: Common, out: Path, dry_run: bool, **chosen: Any) -> None:
    """Write what a fine-tune changed as a LoRA adapter for its base; say what the adapter does not hold.

    A run that was broken off goes on where it stopped.

    \b
    Example:
      weightlab lora extract base/ tuned/ -o adapter/ --rank 32
      weightlab lora extract base/ tuned/ -o adapter/ --energy 0.9 --vectors
    """
    import weightlab as wl
    from weightlab_cli.reports import show_adapter

    with common.resources() as resources, options.destination(out, dry_run) as place:
        done = wl.lora_extract(chosen.pop("base"), chosen.pop("tuned"), place, resources=resources, **chosen)
    common.output.result(done, out=str(out), dry_run=dry_run)
    show_adapter(common.output, str(out), done)


@command.command()
@click.argument("patch", type=options.operand, metavar="PATCH[@SCALE]")
@click.argument("model", type=options.operand)
@options.out("The adapter: a new folder.", required=True)
@_rank
@_energy
@_vectors
@_vllm
@_base_name
@options.dry_run(options.DRY_MADE)
@options.wait
@options.trust_remote_code
@options.common
def export(common: Common, out: Path, dry_run: bool, patch: str, model: str, **chosen: Any) -> None:
    """Write a patch as a LoRA adapter for the model that it is for.

    \b
    Example:
      weightlab lora export change.safetensors base/ -o adapter/
    """
    import weightlab as wl
    from weightlab_cli.reports import show_adapter

    with common.resources() as resources, options.destination(out, dry_run) as place:
        done = wl.lora_export(patch, place, model=model, resources=resources, **chosen)
    common.output.result(done, out=str(out), dry_run=dry_run)
    show_adapter(common.output, str(out), done)


@command.command("import")
@click.argument("adapter", type=options.operand)
@click.argument("base", type=options.operand, required=False)
@options.out("The patch: NAME.safetensors, or a folder.", required=True)
@options.experts_layout
@options.include
@options.exclude
@options.renames("Rename prefixes of the adapter's tensor names to BASE's; may be repeated.")
@options.dry_run(options.DRY_MADE)
@options.wait
@options.trust_remote_code
@options.common
def import_(common: Common, out: Path, dry_run: bool, adapter: str, base: str | None, **chosen: Any) -> None:
    """Write an adapter as a patch; BASE is needed where the adapter holds values, and where names differ.

    ADAPTER is a PEFT folder, or a LoRA file or folder of kohya, LyCORIS, diffusers, MLX, torchtune or llama.cpp.

    \b
    Example:
      weightlab lora import adapter/ base/ -o change.safetensors
      weightlab lora import style.safetensors pipeline/ -o style-patch.safetensors
    """
    import weightlab as wl
    from weightlab.ops.inspect import inspect
    from weightlab_cli.reports import show_patch

    with common.resources() as resources, options.destination(out, dry_run) as place:
        patch = wl.lora_import(adapter, place, base=base, resources=resources, **chosen)
        found = inspect(patch, norms=False)
    show_patch(common.output, str(out), found, resources, dry_run=dry_run)
