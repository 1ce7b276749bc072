"""Options that commands share, as decorators."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightlab_cli.output import Bar, Output

if TYPE_CHECKING:
    from weightlab.stream.executor import Resources

Function = TypeVar("Function", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_size(text: str) -> int:
    """An amount of memory: 512M, 1.5G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is no amount of memory; write for example 512M or 2G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def operand(text: str) -> str:
    """A path. An empty one would be the current folder, which no one means who writes "$UNSET"."""
    if not text:
        raise click.BadParameter("empty; a path is needed")
    return text


def _new_path(text: str) -> Path:
    return Path(operand(text))


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
        from weightlab.stream.executor import Resources

        with Bar(not (self.output.json or self.output.quiet)) as bar:
            yield Resources(self.threads, self.memory, self.device, bar.report)


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show a traceback with an error.")


def common(function: Function) -> Function:
    """--json, --quiet, --debug, --threads, --memory, --device: the command gets them as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
    @click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
    @debug
    @click.option("--threads", type=click.IntRange(min=1), help="Worker threads.  [default: one a core, at most 8]")
    @click.option("--memory", type=memory_size, metavar="SIZE", help="Memory to stay below.  [default: 512M]")
    @click.option("--device", default="cpu", show_default=True, help="Where arithmetic runs: cpu, or an accelerator.")
    @wraps(function)
    def wrapped(
        *args: Any,
        as_json: bool,
        quiet: bool,
        threads: int | None,
        memory: int | None,
        device: str,
        **others: Any,
    ) -> Any:
        return function(Common(Output(as_json, quiet), threads, memory, device), *args, **others)

    return wrapped  # type: ignore[return-value]


def out(text: str, *, required: bool = False) -> Callable[[Function], Function]:
    """-o, --out."""
    return click.option("-o", "--out", type=_new_path, metavar="PATH", required=required, help=text)


@contextmanager
def destination(out: Path, dry: bool) -> Iterator[Path]:
    """Where output goes: in a dry run to temporary storage, which is removed."""
    from weightlab.files.atomic import refuse_existing

    refuse_existing(out)
    if not dry:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="weightlab-") as temporary:
        yield Path(temporary) / out.name


def dry_run(text: str) -> Callable[[Function], Function]:
    """--dry-run, with what it means for this command."""
    return click.option("--dry-run", is_flag=True, help=text)


def renames(text: str) -> Callable[[Function], Function]:
    """--map OLD=NEW or --map auto, given to the command as `renames`: a mapping, or "auto"."""

    def convert(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str] | str:
        from weightlab.tensors.select import parse_renames

        return "auto" if value == ("auto",) else parse_renames(value)

    more = " OLD with a dot before it is whole components, anywhere (.gamma=.weight); `auto` infers them all."
    return click.option("--map", "renames", multiple=True, metavar="OLD=NEW", callback=convert, help=text + more)


def method(default: str) -> Callable[[Function], Function]:
    """--method and --set, given to the command as `method` and `parameters`."""

    def convert(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for text in value:
            name, sign, values = text.partition("=")
            if not (name and sign and values):
                raise click.BadParameter(f"{text!r}: write NAME=VALUE, or NAME=VALUE,VALUE,... with one for each")
            found[name] = values.split(",") if "," in values else values
        return found

    def both(function: Function) -> Function:
        setting = click.option(
            "--set",
            "parameters",
            multiple=True,
            metavar="NAME=VALUE[,VALUE...]",
            callback=convert,
            help="A parameter of the method, or one for each operand in their order; may be repeated.",
        )(function)
        return click.option("--method", default=default, show_default=True, metavar="NAME", help=METHODS)(setting)

    return both


METHODS = (
    "How they become one: task_arithmetic (their sum), linear (their mean), ties, dare_linear, dare_ties, and what "
    "other packages add. Each takes lambda and normalize; the last three density, rescale and scope; dare seed."
)


def _several(flag: str, name: str, metavar: str, text: str) -> Callable[[Function], Function]:
    return click.option(flag, name, multiple=True, metavar=metavar, help=text)


DRY_CHANGE = "Check everything, say what would change and how many bytes and how much memory it takes; write nothing."
DRY_PATCH = "Make the patch in temporary storage ($TMPDIR), say what it holds and takes; keep nothing."
DRY_MADE = "Make it in temporary storage ($TMPDIR), say what it takes; keep nothing."
DRY_READ = "Say how many bytes would be read, and read headers only."

ENCODINGS = (
    "exact",
    "dense[:fp32|bf16|fp16]",
    "quantized:BITS[:linear|log|tanh][:tensor|channel]",
    "sparse:SHARE[:magnitude|random]",
    "low_rank:RANK",
    "low_rank:energy:SHARE",
    "sign",
)
include = _several("--include", "include", "GLOB", "Only tensors whose name matches; may be repeated.")
exclude = _several("--exclude", "exclude", "GLOB", "Not tensors whose name matches; may be repeated.")
encode = _several(
    "--encode",
    "encode",
    "[GLOB=]ENCODING",
    "How tensors are stored; may be repeated, with globs over their names. One of: " + ", ".join(ENCODINGS) + ".",
)
key = click.option(
    "--key", metavar="NAME", help="Where in a nested pickle the weights are, for example model.state_dict."
)
wait = click.option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait for another process to finish."
)
experts_layout = click.option(
    "--experts-layout",
    type=click.Choice(["peft", "unsloth"]),
    help="How stacked experts lie in an adapter's lora_B, where it does not say so.",
)
allow_nonfinite = click.option("--allow-nonfinite", is_flag=True, help="Take NaN and infinity as they are.")


def _trust(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from weightlab.networks.trust import trusting_remote_code

        ctx.with_resource(trusting_remote_code())


trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Let networks and tokenizers be made by the Python files in a model's folder, which can do anything.",
)
allow_growth = click.option("--allow-growth", is_flag=True, help="Let a patch add far more bytes than it has.")
links = click.option(
    "--links",
    type=click.Choice(["refuse", "copy"]),
    default="refuse",
    show_default=True,
    help="A file of the model that is a link: refuse, or make it a copy of its own first.",
)
licence = click.option("--license", help="The patch's licence; kept in the header.")
notes = click.option("--notes", help="Anything to keep in the header.")
