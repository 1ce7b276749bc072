"""`python -m weightlab_cli`."""

from weightlab_cli.main import cli

cli()
