"""Measures the engine side by side with what one would use instead; --help says what and how."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from _measure import (
    Cost,
    cache_folder,
    ensure_environment,
    machine,
    measure,
    medians,
    ratios,
    replace_between_markers,
    size,
    sync,
    table,
    warm,
)
from _synthetic import Shape, differing, digests, in_child, make

MERGEKIT, REMINIS, TORCH = "0.1.5", "0.34.0", "2.13.0"
# Sensible ways to run mergekit on a CPU. --lazy-unpickle is none: it concerns pickled checkpoints only.
MERGEKIT_OPTIONS = {
    "default": [],
    "async": ["--async-write"],
    "shards": ["--out-shard-size", "{shard_bytes}"],
    "shards_async": ["--out-shard-size", "{shard_bytes}", "--async-write"],
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# The most that lies on the disk at one time, in sizes of the model: base, tuned, partly tuned, copy, two
# patches, an output and the patch of the timed diff; reminis adds two databases, a pack and an output.
ROOM, ROOM_REMINIS, ROOM_SCALED = 8.5, 4.5, 4.25


def say(text: str) -> None:
    """A line of progress; standard output is for the table."""
    click.echo(text, err=True)


@dataclass
class Bench:
    """The places, the commands, and what has come out so far."""

    work: Path
    shape: Shape
    weightlab: list[str]
    chosen: Sequence[str]
    repetitions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    programs: dict[str, Path] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        """A path in the work folder."""
        return self.work / name

    def run(self, label: str, command: Sequence[str | Path], reads: Sequence[Path]) -> Cost:
        """One timed run, begun with its inputs in the page cache and nothing waiting to be written."""
        sync(self.work)
        warm(reads)
        say(f"  {label} ...")
        cost = measure([str(part) for part in command], self.work, OFFLINE)
        say(
            f"    {cost.seconds:.2f} s, then {cost.sync_seconds:.2f} s to sync, "
            f"peak {cost.peak_bytes / 1e9:.2f} GB, written {cost.written_bytes / 1e9:.2f} GB"
        )
        if cost.exit_code:
            self.notes.append(f"{label}: exit code {cost.exit_code}: {cost.output.strip()[-300:]}")
            say(f"    exit code {cost.exit_code}:\n{cost.output}")
        self.repetitions.setdefault(label, []).append(asdict(cost) | {"written_bytes": cost.written_bytes})
        return cost

    def own(self, label: str, arguments: Sequence[str | Path], reads: Sequence[Path]) -> Cost:
        """One timed run of weightlab."""
        return self.run(label, [*self.weightlab, *arguments], reads)

    def check(self, name: str, found: object) -> None:
        """Keeps the outcome of every repetition, since each is checked."""
        self.checks.setdefault(name, []).append(found)
        say(f"    {name}: {found}")

    def compare(self, name: str, expected: Path, found: Path) -> None:
        """Counts the values in which an output differs from what it should be."""
        if found.exists():
            self.check(name, in_child(differing, expected, found))
        else:
            self.notes.append(f"{name}: there is no output")


def discard(*paths: Path) -> None:
    """Removes files and folders, there or not."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy(bench: Bench) -> None:
    """cp -r; what syncing the copy takes is measured after every command anyway."""
    target = bench.place("copied")
    bench.run("copy", ["cp", "-r", bench.place("base"), target], [bench.place("base")])
    discard(target)


def mergekit(bench: Bench) -> None:
    """base + 1.0 x (tuned - base) with each of the options."""
    base, tuned, out = bench.place("base"), bench.place("tuned"), bench.place("merged")
    config = bench.place("mergekit.json")  # JSON is YAML
    merge = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 1.0}}],
        "dtype": "bfloat16",
    }
    config.write_text(json.dumps(merge))
    # What of the rest is starting up; it also brings the environment into the page cache.
    bench.run("start_mergekit", [bench.programs["mergekit"], "--help"], [])
    for name, options in MERGEKIT_OPTIONS.items():
        given = [option.format(shard_bytes=bench.shape.shard_bytes) for option in options]
        command: list[str | Path] = [bench.programs["mergekit"], config, out, "--quiet", *given]
        # The synthetic models have no tokenizer to copy.
        bench.run(f"mergekit_{name}", [*command, "--no-copy-tokenizer"], [base, tuned])
        bench.compare("mergekit output, against tuned", tuned, out)
        discard(out)


def apply_out(bench: Bench) -> None:
    """The whole model, patched into a new folder."""
    base, out = bench.place("base"), bench.place("applied")
    for encoding in ("dense", "exact"):
        patch = bench.place(f"{encoding}.patch")
        bench.own(f"apply_out_{encoding}", ["apply", base, patch, "--out", out], [base, patch])
        bench.compare(f"apply --out of the {encoding} patch, against tuned", bench.place("tuned"), out)
        discard(out)


def in_place(bench: Bench) -> None:
    """A small patch put on and taken off again."""
    base, model, patch = bench.place("base"), bench.place("model"), bench.place("partial.patch")
    if not model.exists():
        shutil.copytree(base, model)
    clean = in_child(digests, base)
    bench.own("status", ["status", model], [model])
    bench.own("apply_in_place", ["apply", model, patch, "--in-place"], [model, patch])
    bench.compare("apply --in-place, against the partly tuned", bench.place("partial"), model)
    bench.own("remove_in_place", ["remove", model, patch, "--in-place"], [model, patch])
    restored = in_child(digests, model) == clean
    bench.check("remove --in-place restored the SHA-256 of every shard", restored)
    if not restored:
        discard(model)


def diff(bench: Bench) -> None:
    """The whole pair made into a patch."""
    base, tuned, patch = bench.place("base"), bench.place("tuned"), bench.place("timed.patch")
    for encoding in ("exact", "dense"):
        bench.own(f"diff_{encoding}", ["diff", base, tuned, "-o", patch, "--encode", encoding], [base, tuned])
        if patch.exists():
            bench.sizes[f"weightlab {encoding} patch"] = size(patch)
        discard(patch)


def reminis(bench: Bench) -> None:
    """Its lossless pack, which needs both models in its database first."""
    base, tuned = bench.place("base.db"), bench.place("tuned.db")
    for name, database in (("base", base), ("tuned", tuned)):
        if not database.exists():  # once: converting is what comes before its diff
            model = bench.place(name)
            bench.run(
                "reminis_convert",
                [bench.programs["reminis"], "convert", model, "-o", database, "-q"],
                [model],
            )
    pack, out = bench.place("reminis.pack.db"), bench.place("reminis.out.db")
    bench.run("reminis_diff", [bench.programs["reminis"], "diff", base, tuned, "-o", pack, "-q"], [base, tuned])
    if pack.exists():
        bench.sizes["reminis pack"] = size(pack)
        bench.run("reminis_apply", [bench.programs["reminis"], "apply", base, pack, "-o", out, "-q"], [base, pack])
        bench.compare("reminis apply, against tuned", bench.place("tuned"), out)
    discard(pack, out)


def memory(bench: Bench, shape: Shape, keep: bool) -> None:
    """apply --out once more at a larger size, after all else has gone from the disk."""
    if "apply_out_dense" not in bench.repetitions:
        bench.notes.append("memory has nothing to be compared with: apply-out was left out")
    names = ("scaled-base", "scaled-tuned", "scaled.patch", "scaled-applied")
    base, tuned, patch, out = map(bench.place, names)
    if not enough_room(bench.work, ROOM_SCALED * shape.bytes, "the scaled model", bench.notes):
        return
    say(f"Making the scaled pair: {shape.parameters:,} parameters")
    bench.checks["scaled model"] = in_child(make, shape, base, tuned, None)
    bench.own("diff_dense_scaled", ["diff", base, tuned, "-o", patch, "--encode", "dense"], [])
    bench.own("apply_out_dense_scaled", ["apply", base, patch, "--out", out], [base, patch])
    bench.compare("apply --out of the scaled dense patch, against tuned", tuned, out)
    discard(out, patch, *([] if keep else [base, tuned]))


def enough_room(work: Path, needed: float, what: str, notes: list[str]) -> bool:
    """Whether that much is free; says so if not."""
    free = shutil.disk_usage(work).free
    if free < needed:
        notes.append(f"{what} is left out: it needs {needed / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB is free")
        say(notes[-1])
    return free >= needed


MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "copy": copy,
    "mergekit": mergekit,
    "apply-out": apply_out,
    "in-place": in_place,
    "diff": diff,
    "reminis": reminis,
}


def prepare(bench: Bench) -> dict[str, Any]:
    """The environments, the models, and the patches that the measurements need."""
    if "mergekit" in bench.chosen:
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


def versions() -> dict[str, str]:
    """Of the interpreter, of what weightlab stands on, and of what it is compared with."""
    found = {"python": platform.python_version(), "mergekit": MERGEKIT, "reminis": REMINIS}
    for name in ("weightlab", "torch", "numpy", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def own_command(given: str | None) -> list[str]:
    """How weightlab is started: as asked for, else with the interpreter that runs this."""
    if given:
        return shlex.split(given)
    if importlib.util.find_spec("weightlab_cli"):
        return [sys.executable, "-m", "weightlab_cli"]
    script = Path(sys.executable).with_name("weightlab")
    if script.exists():
        return [str(script)]
    raise click.UsageError("weightlab is not installed here; install it, or use --weightlab-command")


def conclude(bench: Bench, made: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """All that has come out, as it goes to --json."""
    middle = medians(bench.repetitions)
    return {
        "schema_version": 1,
        "machine": machine(bench.work),
        "versions": versions(),
        "parameters": settings | {"mergekit_options": MERGEKIT_OPTIONS},
        "model": made,
        "sizes": bench.sizes,
        "repetitions": bench.repetitions,
        "medians": middle,
        "ratios": ratios(middle, bench.shape.partial_bytes()),
        "checks": bench.checks,
        "notes": bench.notes,
    }


def tidy(folder: Path, keep: bool) -> None:
    """Empties the work folder, but for the models where they are to be kept."""
    kept = ("base", "tuned", "partial", "scaled-base", "scaled-tuned")
    for path in folder.iterdir():
        if not (keep and (path.name in kept or path.name.endswith(".made.json"))):
            discard(path)


HELP = f"""Measure weightlab's engine side by side with cp, mergekit and reminis, in one run.

A Llama-shaped bf16 pair is made tensor by tensor (TinyLlama's width; the number of layers follows from
--parameters): base, tuned = base + heavy-tailed noise (relative change about 1e-2, about 40 % of the bf16
values change), and a second tuned model that differs in about 5 % of the bytes only. Then, --repeat times in
turn:

\b
  copy       cp -r of a model, and the sync of that copy
  mergekit   mergekit {MERGEKIT}: task_arithmetic of one model, with several
             options for CPUs; the fastest is the one compared with
  apply-out  weightlab apply BASE PATCH --out DIR, of a dense and of an exact
             patch of the whole model
  in-place   weightlab apply and remove --in-place of the patch that touches
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
  python evals/benchmarks/engine.py --parameters 2e8 --repeat 1 --only copy
"""


@click.command(help=HELP)
@click.option("--parameters", default=1.1e9, show_default=True, help="Size of the model; 1.75e8 at least.")
@click.option("--shard-bytes", default=10**9, show_default=True, help="Most bytes of a shard.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs of each.")
@click.option("--scale-up", default=4.0, show_default=True, help="Size of the larger model, in models; 0: none.")
@click.option("--only", multiple=True, type=click.Choice([*MEASUREMENTS, "memory"]), help="Just this; repeatable.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the models. [default: in the cache]")
@click.option("--keep", is_flag=True, help="Keep the models; a later run with the same --work takes them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that came out.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
@click.option("--weightlab-command", help="How to start weightlab. [default: with this interpreter]")
def main(json_path: Path | None, readme: Path | None, weightlab_command: str | None, **settings: Any) -> None:
    """Prepares, measures in turn, reports."""
    chosen = settings["only"] or (*MEASUREMENTS, "memory")
    needed = {"apply-out", "in-place", "diff", "memory"} & set(chosen)
    own = own_command(weightlab_command) if needed else []
    if readme:
        replace_between_markers(readme, "")  # fails now rather than after an hour
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
    room = (ROOM + ROOM_REMINIS * ("reminis" in chosen)) * bench.shape.bytes - size(folder)
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
            larger = Shape.for_parameters(settings["scale_up"] * bench.shape.parameters, bench.shape.shard_bytes)
            memory(bench, larger, keep)
        result = conclude(bench, made, settings)
    finally:
        tidy(folder, keep)
    text = table(result)
    click.echo(text)
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    if readme:
        readme.write_text(replace_between_markers(readme, text))


if __name__ == "__main__":
    main()
