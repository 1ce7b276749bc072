"""Options that commands share, as decorators."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightlab_cli.output import Bar, Output

if TYPE_CHECKING:
    from weightlab.stream.executor import Resources

Function = TypeVar("Function", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(click.ParamType[int]):
    """An amount of memory: 512M, 2G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no amount of memory; write for example 512M or 2G", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True, slots=True)
class Common:
    """What every command is given: where its result goes, and what it may use."""

    output: Output
    threads: int | None
    memory: int | None
    device: str

    @contextmanager
    def resources(self) -> Iterator[Resources]:
        """The library's resources, with a progress bar while the block runs."""
        from weightlab.stream.executor import DEFAULT_MEMORY, Resources

        with Bar(not (self.output.json or self.output.quiet)) as bar:
            memory = DEFAULT_MEMORY if self.memory is None else self.memory
            yield Resources(self.threads, memory, self.device, bar.report)


def common(function: Function) -> Function:
    """--json, --quiet, --debug, --threads, --memory, --device: the command gets them as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
    @click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
    @click.option("--debug", is_flag=True, help="Show a traceback with an error.")
    @click.option("--threads", type=click.IntRange(min=1), help="Worker threads.  [default: one a core, at most 8]")
    @click.option("--memory", type=Memory(), help="Memory to stay below.  [default: 512M]")
    @click.option("--device", default="cpu", show_default=True, help="Where arithmetic runs: cpu, or an accelerator.")
    @wraps(function)
    def wrapped(
        *args: Any,
        as_json: bool,
        quiet: bool,
        debug: bool,
        threads: int | None,
        memory: int | None,
        device: str,
        **others: Any,
    ) -> Any:
        return function(Common(Output(as_json, quiet), threads, memory, device), *args, **others)

    return wrapped  # type: ignore[return-value]


def _several(flag: str, name: str, metavar: str, text: str) -> Callable[[Function], Function]:
    return click.option(flag, name, multiple=True, metavar=metavar, help=text)


include = _several("--include", "include", "GLOB", "Only tensors whose name matches; may be repeated.")
exclude = _several("--exclude", "exclude", "GLOB", "Not tensors whose name matches; may be repeated.")
encode = _several(
    "--encode",
    "encode",
    "[GLOB=]ENCODING",
    "How tensors are stored; may be repeated with globs. exact · dense[:DTYPE] · quantized:BITS[:LEVELS][:SCOPE] · "
    "sparse:SHARE[:random] · low_rank:RANK · sign",
)
key = click.option(
    "--key", metavar="NAME", help="Where in a nested pickle the weights are, for example model.state_dict."
)
wait = click.option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait for another process to finish."
)
dry_run = click.option("--dry-run", is_flag=True, help="Check everything, say what would change, write nothing.")
allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Take NaN and infinity as they are.")
links = click.option(
    "--links",
    type=click.Choice(["refuse", "copy"]),
    default="refuse",
    show_default=True,
    help="A file of the model that is a link: refuse, or make it a copy of its own first.",
)


def renames(text: str) -> Callable[[Function], Function]:
    """--map OLD=NEW, given to the command as a mapping called `renames`."""

    def convert(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
        from weightlab.tensors.select import parse_renames

        return parse_renames(value)

    return click.option("--map", "renames", multiple=True, metavar="OLD=NEW", callback=convert, help=text)
