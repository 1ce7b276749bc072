"""Measures the engine side by side with what one would use instead; --help says what and how."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from _compare import in_child
from _environment import REMINIS, cache_folder, ensure_environment, machine, versions
from _measure import size
from _report import medians, ratios, replace_between_markers, table
from _runs import MEASUREMENTS, MERGEKIT_OPTIONS, Bench, discard, enough_room, memory, say
from _synthetic import Shape, make

MERGEKIT, TORCH = "0.1.5", "2.13.0"
# The most that lies on the disk at one time, in sizes of the model: base, tuned, partly tuned, copy, two
# patches, an output and the patch of the timed diff; reminis adds two databases, a pack and an output, TIES a second
# tuned model and two outputs, of which one is there when that model's base is.
ROOM, ROOM_REMINIS, ROOM_TIES = 8.5, 4.5, 3


def prepare(bench: Bench) -> dict[str, Any]:
    """The environments, the models, and the patches that the measurements need."""
    if {"mergekit", "ties"} & set(bench.chosen):
        say("Looking for mergekit's environment")
        # torch first and alone: else the resolver may fetch other builds of it before it settles on this one.
        steps = [[f"torch=={TORCH}"], [f"mergekit=={MERGEKIT}", f"torch=={TORCH}"]]
        bench.programs["mergekit"] = ensure_environment(f"mergekit-{MERGEKIT}", steps) / "mergekit-yaml"
    if "reminis" in bench.chosen:
        say("Looking for reminis's environment")
        folder = ensure_environment(f"reminis-{REMINIS}", [[f"reminis=={REMINIS}"]])
        bench.programs["reminis"] = folder / "reminis"
    say(f"Making base, tuned and partly tuned: {bench.shape.parameters:,} parameters each")
    base, tuned, partial = map(bench.place, ("base", "tuned", "partial"))
    made = in_child(make, bench.shape, base, tuned, partial)
    wanted = {"dense": tuned, "exact": tuned} if "apply-out" in bench.chosen else {}
    wanted |= {"partial": partial} if "in-place" in bench.chosen else {}
    for name, model in wanted.items():
        patch, encoding = bench.place(f"{name}.patch"), "exact" if name == "exact" else "dense"
        command: list[str | Path] = ["diff", base, model, "-o", patch, "--encode", encoding]
        bench.own(f"prepare_{name}_patch", command, [base, model])
        if patch.exists():
            bench.sizes[f"weightlab {name} patch"] = size(patch)
    return made


def own_command() -> list[str]:
    """weightlab, with the interpreter that runs this."""
    if not importlib.util.find_spec("weightlab_cli"):
        raise click.UsageError("weightlab is not installed here: pip install .")
    return [sys.executable, "-m", "weightlab_cli"]


def conclude(bench: Bench, made: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """All that has come out, as it goes to --json."""
    middle = medians(bench.repetitions)
    return {
        "schema_version": 1,
        "machine": machine(bench.work),
        "versions": versions("weightlab", "torch", "numpy", "safetensors") | {"mergekit": MERGEKIT, "reminis": REMINIS},
        "parameters": settings | {"mergekit_options": MERGEKIT_OPTIONS},
        "model": made,
        "sizes": bench.sizes,
        "repetitions": bench.repetitions,
        "medians": middle,
        "ratios": ratios(middle, bench.sizes, bench.shape.partial_bytes()),
        "checks": bench.checks,
        "notes": bench.notes,
    }


def tidy(folder: Path, keep: bool) -> None:
    """Empties the work folder, but for the models where they are to be kept."""
    kept = ("base", "tuned", "partial", "second", "scaled-base", "scaled-tuned")
    for path in folder.iterdir():
        if not (keep and (path.name in kept or path.name.endswith(".made.json"))):
            discard(path)


HELP = f"""Measure weightlab's engine side by side with cp, mergekit and reminis, in one run.

A Llama-shaped bf16 pair is made tensor by tensor (TinyLlama's width where the size allows it; the number of
layers follows from --parameters): base, tuned = base + heavy-tailed noise (relative change about 1e-2, about 40 %
of the bf16 values change), and a second tuned model that differs in about 5 % of the bytes only. Then, --repeat
times in turn:

\b
  copy       cp -r of a model, and the sync of that copy
  mergekit   mergekit {MERGEKIT}: task_arithmetic of one model, with several
             options for CPUs; the fastest is the one compared with
  ties       wl.merge of the tuned model and a second one by TIES, density 0.2,
             and mergekit's, which sums in fp32 too (with two options)
  apply-out  weightlab apply BASE PATCH --out DIR, of a dense and of an exact
             patch of the whole model
  in-place   weightlab apply --in-place and remove of the patch that touches
             5 % of the bytes; weightlab status is what starting up costs
  diff       weightlab diff -o, --encode exact and --encode dense
  reminis    reminis {REMINIS}: conversion to its database (once a model), diff
             to a lossless pack, apply
  memory     apply-out once more, at --scale-up times the size (once, last)

Taken of each: wall time and the time to sync the disk afterwards, peak memory of the process tree (resident,
and without mapped file pages), bytes read and written. Before each run its inputs are read into the page
cache and all writing is brought to an end; no cache is dropped. Every output is compared with what it should
be, and what differs is reported. Targets are shown beside the results; nothing is asserted.

mergekit and reminis are installed into environments of their own in $WEIGHTLAB_CACHE/benchmarks, or
~/.cache/weightlab/benchmarks, the first time. Linux only. At the default size it needs about 29 GB of disk,
and 38 GB once that is free again for the larger size, which is left out (and said so) where there is less.

\b
Examples:
  python evals/benchmarks/engine.py --json engine.json --readme README.md
  python evals/benchmarks/engine.py --parameters 2e7 --repeat 1 --scale-up 2
"""


@click.command(help=HELP)
@click.option("--parameters", default=1.1e9, show_default=True, help="Size of the model; 2e7 at least.")
@click.option("--shard-bytes", default=10**9, show_default=True, help="Most bytes of a shard.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs of each.")
@click.option("--scale-up", default=4.0, show_default=True, help="Size of the larger model, in models; 0: none.")
@click.option("--only", multiple=True, type=click.Choice([*MEASUREMENTS, "memory"]), help="Just this; repeatable.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the models. [default: in the cache]")
@click.option("--keep", is_flag=True, help="Keep the models; a later run with the same --work takes them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that came out.")
@click.option(
    "--readme",
    type=click.Path(exists=True, path_type=Path),
    help="Put the table between its markers; with one --only, those of that name.",
)
def main(json_path: Path | None, readme: Path | None, **settings: Any) -> None:
    """Prepares, measures in turn, reports."""
    chosen = settings["only"] or (*MEASUREMENTS, "memory")
    own = own_command() if {"apply-out", "in-place", "diff", "ties", "memory"} & set(chosen) else []
    section = chosen[0] if len(chosen) == 1 else "engine"
    if readme:
        replace_between_markers(readme, section, "")  # fails now rather than after an hour
    work, keep = settings.pop("work"), settings.pop("keep")
    # A folder of our own even in --work, so that nothing of anyone else's can be overwritten or removed.
    folder = (work or cache_folder()).resolve() / "engine-models"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise click.ClickException(f"another run is using {folder}; give this one a --work of its own") from None
    bench = Bench(folder, Shape.for_parameters(settings["parameters"], settings["shard_bytes"]), own, chosen)
    room = ROOM + ROOM_REMINIS * ("reminis" in chosen) + ROOM_TIES * ("ties" in chosen)
    room = room * bench.shape.bytes - size(folder)
    if not enough_room(folder, room, "this benchmark", bench.notes):
        raise click.ClickException(f"{bench.notes[-1]}; try a smaller --parameters, or --work on another disk")
    try:
        tidy(folder, True)
        made = prepare(bench)
        for repetition in range(settings["repeat"]):
            for name in filter(chosen.__contains__, MEASUREMENTS):
                say(f"{name}, {repetition + 1} of {settings['repeat']}")
                MEASUREMENTS[name](bench)
        if json_path:  # also now, since the larger model may yet meet a limit of the machine
            json_path.write_text(json.dumps(conclude(bench, made, settings), indent=2) + "\n")
        if "memory" in chosen and settings["scale_up"]:
            tidy(folder, keep)
            memory(bench, bench.shape.scaled(settings["scale_up"] * bench.shape.parameters), keep)
        result = conclude(bench, made, settings)
    finally:
        tidy(folder, keep)
    text = table(result)
    click.echo(text)
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    if readme:
        readme.write_text(replace_between_markers(readme, section, text))


if __name__ == "__main__":
    main()
