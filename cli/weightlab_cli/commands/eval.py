"""`weightlab eval`: a group whose members are the modules of `weightlab_cli.evaluations`."""

from __future__ import annotations

import click

from weightlab.registry import Registry

EVALUATIONS: Registry[click.Command] = Registry("weightlab_cli.evaluations", "command", "evaluation")


class _Evaluations(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return EVALUATIONS.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return EVALUATIONS.get(cmd_name)  # an unknown name is answered with the nearest


@click.group(cls=_Evaluations)
def command() -> None:
    """Score a model, and the same model with patches on it in memory.

    \b
    Example:
      weightlab eval images vit/ --data photos/ --patch noise.safetensors
    """
