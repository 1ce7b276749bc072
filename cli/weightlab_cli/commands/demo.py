"""`weightlab demo`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

import click

from weightlab_cli import options


@click.command()
@click.argument("what", default="patch")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(".cache/wheels"),
    show_default=True,
    help="For all but `signature`: the folder with downloaded packages.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
@click.option("--picture", type=click.Path(path_type=Path), help="Where it goes.  [default: weightlab-demo.png]")
@options.debug
def command(what: str, data: Path, keep: Path | None, picture: Path | None) -> None:
    """Show on real data what weightlab does.

    WHAT is `patch`, the life of a patch in a minute; `signature`, robustness to noise as a file, in two; `transfer`, a
    fine-tune moved to the next release of a language model, in four; or `twin`, four fine-tunes as one model, in three.

    \b
    Example:
      pip download --no-deps -d .cache/wheels chgnet==0.4.2
      weightlab demo
      weightlab demo signature --picture signature.png
    """
    from weightlab_evals.demos import DEMOS, Steps

    from weightlab.files.atomic import refuse_existing
    from weightlab_cli.main import invoke

    begun = time.monotonic()
    demo = DEMOS.get(what)
    data, picture = data.absolute(), (picture or Path("weightlab-demo.png")).absolute()
    demo.check(data)
    with contextlib.ExitStack() as stack:
        if keep is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightlab-demo-")))
        else:
            refuse_existing(keep)
            keep.mkdir(exist_ok=True)
            work = keep.absolute()
        before = Path.cwd()
        os.chdir(work)  # so that the commands are printed as a user would type them
        stack.callback(os.chdir, before)
        steps = Steps(invoke, click.echo)
        demo.run(data, picture, steps)
        steps.say(f"Done in {time.monotonic() - begun:.0f} seconds.")
