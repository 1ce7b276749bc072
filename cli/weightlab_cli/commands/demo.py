"""`weightlab demo`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import click

from weightlab_cli import options


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(".cache/wheels"),
    show_default=True,
    help="The folder with the downloaded wheel of chgnet.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the files in this new folder.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default=Path("weightlab-demo.png"),
    show_default=True,
    help="Where the picture goes.",
)
@options.debug
def command(data: Path, keep: Path | None, picture: Path) -> None:
    """Show the life of a patch on a real model, in a minute.

    \b
    Example:
      pip download --no-deps -d .cache/wheels chgnet==0.4.2
      weightlab demo
    """
    from weightlab_evals.demo import demonstrate, find_wheel

    from weightlab.files.atomic import refuse_existing
    from weightlab_cli.main import invoke

    wheel, picture = find_wheel(data).absolute(), picture.absolute()
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
        demonstrate(wheel, Path(), picture, invoke, click.echo)
