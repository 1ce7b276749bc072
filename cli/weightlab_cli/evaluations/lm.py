"""`weightlab eval lm`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from weightlab_cli import options
from weightlab_cli.evaluations._scales import scales_of
from weightlab_cli.options import Common


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("model", type=options.operand)
@click.option(
    "--patch", "patches", multiple=True, metavar="PATCH[@SCALE]", help="On the model, all together; repeatable."
)
@click.option(
    "--scales", default="1", show_default=True, callback=scales_of, help="Factors of the patches' scales; 0: clean."
)
@click.option("-o", "--output_path", "out", type=Path, metavar="FOLDER", help="Gets one folder a stack.")
@click.option("-c", "--use_cache", "cache", metavar="PATH", help="lm_eval's cache of answers; one file a stack.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LM_EVAL OPTIONS]...")
@options.dry_run("Say which stacks would be scored; load nothing.")
@options.trust_remote_code
@options.common
def command(
    common: Common,
    model: str,
    patches: tuple[str, ...],
    scales: tuple[float, ...],
    out: Path | None,
    cache: str | None,
    arguments: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Score a language model by lm_eval, with patches on it in memory.

    Every other option is lm_eval's own (`lm_eval run --help`), for instance --tasks, --limit, --num_fewshot. The model
    is loaded once, and nothing is written but lm_eval's results; what was on is under `config.weightlab` in them. A
    twin (`weightlab twin split`) is a model too: its router is asked about the context of each question.

    \b
    Example:
      weightlab eval lm base/ --patch math.safetensors --scales 0,0.5,1 --tasks gsm8k -o results/
    """
    from weightlab.ops.operands import parse_patch

    named = [parse_patch(patch) for patch in patches]
    stacks = [
        [f"{path}@{(1.0 if own is None else own) * factor!r}" for path, own in named] if factor and named else []
        for factor in (scales if named else (0.0,))
    ]
    if dry_run:
        common.output.result({"dry_run": True, "stacks": stacks})
        for stack in stacks:
            common.output.line(f"would score: {', '.join(stack) or 'the clean model'}")
        return
    try:
        from weightlab_evals.lm.run import run_cli
    except ImportError as error:
        from weightlab.errors import UsageError

        raise UsageError(f"this needs lm_eval: {error}", "pip install 'weightlab[lm]'") from error
    if click.get_current_context().get_parameter_source("device") is ParameterSource.COMMANDLINE:
        arguments = (*arguments, "--device", common.device)
    silent = common.output.json or common.output.quiet
    with contextlib.redirect_stdout(sys.stderr) if silent else contextlib.nullcontext():
        names = run_cli(model, stacks, arguments, out, cache)
    common.output.result({"model": model, "stacks": names, "out": None if out is None else str(out)})
