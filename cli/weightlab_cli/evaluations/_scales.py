"""The option --scales of evaluations."""

from __future__ import annotations

import click


def scales_of(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} are no numbers; write for example 0,0.5,1") from error
