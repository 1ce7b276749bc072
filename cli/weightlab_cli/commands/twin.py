"""`weightlab twin`: a group of its own, as its commands work on one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightlab_cli import options
from weightlab_cli.options import Common
from weightlab_cli.output import Output, size

_TEXT_BYTES = 2**30
"""That a file of samples may have."""


@click.group()
def command() -> None:
    """Several fine-tunes as one model, mixed for every input.

    \b
    Example:
      weightlab twin split base/ math/ code/ chat/ -o twin/ --compress low_rank:16
      weightlab twin route twin/ --data math=math.jsonl --data code=code.jsonl --data chat=chat.jsonl
      weightlab twin export twin/ -o served/
    """


@command.command()
@click.argument("base", type=options.operand)
@click.argument("experts", nargs=-1, required=True, type=options.operand, metavar="[NAME=]EXPERT...")
@options.out("The twin: a new folder.", required=True)
@options.method("task_arithmetic")
@click.option(
    "--compress",
    default="low_rank:16",
    show_default=True,
    metavar="HOW",
    help="How exclusive parts are stored: low_rank:RANK, energy:SHARE, sparse:SHARE, random:SHARE, or an encoding.",
)
@click.option("--encode-shared", default="dense", show_default=True, metavar="ENCODING", help="The shared part.")
@options.renames("Rename prefixes of the experts' tensor names to BASE's; may be repeated.")
@click.option("--base-name", metavar="ORG/NAME", help="What BASE is called on the Hub; kept in the header.")
@click.option("--revision", help="BASE's revision; kept in the header.")
@options.licence
@options.allow_nonfinite
@options.dry_run(options.DRY_MADE)
@options.wait
@options.trust_remote_code
@options.common
def split(
    common: Common,
    base: str,
    experts: tuple[str, ...],
    out: Path,
    dry_run: bool,
    parameters: dict[str, Any],
    **chosen: Any,
) -> None:
    """Split experts of one base into a shared part and a compressed exclusive part for each.

    An expert is a checkpoint, a patch or a PEFT adapter. Tensors that not all of them have in one shape, such as
    classifiers, stay with their expert. Here task_arithmetic has lambda=0.3 unless --set says otherwise; --set
    weight=A,B,... gives each expert a weight.

    \b
    Example:
      weightlab twin split base/ math/ code/ chat/ -o twin/ --compress low_rank:16
      weightlab twin split base/ law=lora-7/ tax=lora-9/ -o twin/ --method ties --set density=0.2
    """
    import weightlab as wl

    weights = parameters.pop("weight", None)
    chosen |= {"weights": weights if isinstance(weights, list) or weights is None else [weights]}
    chosen["weights"] = None if chosen["weights"] is None else [_number(each) for each in chosen["weights"]]
    with common.resources() as resources, options.destination(out, dry_run) as place:
        twin = wl.twin_split(base, experts, place, parameters=parameters, resources=resources, **chosen)
        _show_split(common.output, twin, str(out), wl.inspect(base, norms=False).bytes, dry_run=dry_run)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"weight={text!r} is no number") from None


def _show_split(output: Output, twin: Any, out: str, full: int, *, dry_run: bool) -> None:
    sizes = twin.sizes()
    total, copies = sum(sizes.values()), full * len(twin.names)
    experts = [{"name": n, "id": twin.exclusive[n].id, "bytes": sizes[n], "heads": twin.heads(n)} for n in twin.names]
    told: dict[str, Any] = {"path": out, "shared": {"id": twin.shared.id, "bytes": sizes["shared"]}, "experts": experts}
    header = twin.header
    told |= {"bytes": total, "full_bytes": copies, "method": header.method, "left_out": header.left_out}
    output.result({**told, "kept": header.kept, "dry_run": dry_run})
    rows = [["shared", size(sizes["shared"]), f"{sizes['shared'] / full:.1%}", "", ""]]
    for name in twin.names:
        errors = [r.error.relative_l2 for r in twin.exclusive[name].records.values() if r.error is not None]
        worst = f"{max(errors):.3g}" if errors else ""
        rows.append([name, size(sizes[name]), f"{sizes[name] / full:.1%}", worst, ", ".join(twin.heads(name))])
    output.table(["part", "#bytes", "#of a model", "#largest error", "own tensors"], rows)
    for name in header.left_out:
        output.line(f"left out: {name} (no expert has it, or it is a copy of a tied weight)")
    for name in header.kept:
        output.line(f"kept: {name} (integers, which experts have otherwise; the base's stay)")
    output.line(
        f"{out}: {'would be ' if dry_run else ''}{size(total)}; {len(twin.names)} full copies are {size(copies)}"
    )


@command.command()
@click.argument("folder", type=options.operand, metavar="TWIN")
@click.option(
    "--data",
    "data",
    multiple=True,
    required=True,
    metavar="NAME=FILE",
    help="An expert's training texts: one a line, or JSON lines with `text`; for each expert. Never test data.",
)
@click.option(
    "--router", "kind", default="trained", show_default=True, metavar="NAME", help="trained, nearest, response."
)
@click.option("--base", type=options.operand, help="Where the base is now.  [default: where it was]")
@click.option(
    "--held-out", type=float, default=0.2, show_default=True, help="Share to choose a checkpoint by, and measure on."
)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Texts at a time.")
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of a text at most.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many texts of each expert.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is held out, and of training.")
@options.dry_run("Make and measure the router; do not keep it.")
@options.wait
@options.trust_remote_code
@options.common
def route(
    common: Common,
    folder: str,
    data: tuple[str, ...],
    kind: str,
    base: str | None,
    batch: int,
    length: int,
    limit: int | None,
    dry_run: bool,
    wait: float,
    **chosen: Any,
) -> None:
    """Make the router of a twin of language models, and say how well it routes.

    \b
    trained   a small network on the shared model's mean hidden state (the paper's)
    nearest   the nearest mean of the experts' hidden states; no training
    response  whose right singular vectors the layers' inputs lie in; no training

    \b
    Example:
      weightlab twin route twin/ --data math=math.jsonl --data code=code.jsonl --data chat=chat.jsonl
    """
    import weightlab as wl

    with common.resources() as resources:
        wl.open_twin(Path(folder))
        tokenizer = _tokenizer(folder)
        model = wl.TwinModel.from_pretrained(folder, base, wait=wait, resources=resources)
        texts = {name: _texts(path)[:limit] for name, path in _pairs(data).items()}
        batches = {name: _batches(tokenizer, every, batch, length) for name, every in texts.items()}
        routed = wl.route(model, batches, kind=kind, **chosen)
        if not dry_run:
            wl.save_router(routed.router, Path(folder))
    output = common.output
    told = {"router": kind, "samples": routed.samples, "held_out": routed.held_out, "accuracy": routed.accuracy}
    told |= {"by_expert": routed.by_expert, "calibration": routed.calibration, "dry_run": dry_run}
    output.result({"path": folder, **told})
    output.table(["expert", "#right"], [[name, f"{share:.1%}"] for name, share in routed.by_expert.items()])
    rows = [
        [f"{each.low:.1f} to {each.high:.1f}", str(each.samples), f"{each.weight:.2f}", f"{each.right:.2f}"]
        for each in routed.calibration
    ]
    output.table(["largest weight", "#texts", "#on average", "#right"], rows, f"of {routed.held_out} texts held out")
    output.line(f"{folder}: {kind} router, {routed.accuracy:.1%} of {routed.held_out} texts to the right expert")


@command.command()
@click.argument("folder", type=options.operand, metavar="TWIN")
@options.out("A new folder: `shared`, and one for each expert.", required=True)
@click.option("--peft/--vllm", default=True, show_default=True, help="Who is to load the adapters.")
@click.option("--base", type=options.operand, help="Where the base is now.  [default: where it was]")
@click.option("--rank", type=click.IntRange(min=1), help="Of parts that are not low-rank already.")
@click.option("--vectors/--no-vectors", default=True, show_default=True, help="Norms, biases, classifiers as values.")
@click.option("--architecture", metavar="CLASS", help="The class of transformers.  [default: the experts']")
@options.dry_run(options.DRY_MADE)
@options.wait
@options.trust_remote_code
@options.common
def export(common: Common, folder: str, out: Path, peft: bool, dry_run: bool, **chosen: Any) -> None:
    """Write the shared model as a checkpoint, and each exclusive part as a LoRA adapter for it.

    What a LoRA adapter cannot hold goes along as values (modules_to_save). vLLM takes none of those: they are left out,
    and the residual says how much that is.

    \b
    Example:
      weightlab twin export twin/ -o served/
      weightlab twin export twin/ -o served/ --vllm
    """
    import weightlab as wl
    from weightlab_cli.reports import show_adapter

    with common.resources() as resources, options.destination(out, dry_run) as place:
        done = wl.twin_export(folder, place, vllm=not peft, resources=resources, **chosen)
    common.output.result(done, out=str(out), dry_run=dry_run)
    for name, adapter in done.adapters.items():
        show_adapter(common.output, name, adapter)
    common.output.line(f"{out}/shared: the shared model")


def _pairs(data: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in data:
        name, sign, path = text.partition("=")
        if not (name and sign and path) or name in found:
            raise click.BadParameter(f"{text!r}: write NAME=FILE, once for each expert")
        found[name] = path
    return found


def _texts(path: str) -> list[str]:
    from weightlab.files.foreign import read_json_lines, read_text, validated

    file = Path(path)
    if file.suffix not in (".jsonl", ".json"):
        return [line for line in read_text(file, limit=_TEXT_BYTES).split("\n") if line.strip()]
    lines = read_json_lines(file, dict[str, Any], limit=_TEXT_BYTES)
    found: list[str] = validated([line.get("text") for line in lines], list[str], f"{path}: `text` of each line")
    return found


def _tokenizer(folder: str) -> Any:
    """The one in the twin's folder, which fills up texts to one length."""
    from weightlab.networks.tokenizers import tokenizer_in

    tokenizer = tokenizer_in(Path(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _batches(tokenizer: Any, texts: list[str], batch: int, length: int) -> Any:
    """Batches of texts as the tokenizer has them."""
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        found = tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt")
        yield {name: found[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in found}
