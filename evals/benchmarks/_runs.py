"""The runs of the engine's benchmark: what is measured, on which inputs, and what its output is compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from _compare import differing, digests, in_child
from _measure import Cost, measure, size, sync, warm
from _synthetic import Shape, make
from _ties import compared

# Sensible ways to run mergekit on a CPU. --lazy-unpickle is none: it concerns pickled checkpoints only.
MERGEKIT_OPTIONS = {
    "default": [],
    "async": ["--async-write"],
    "shards": ["--out-shard-size", "{shard_bytes}"],
    "shards_async": ["--out-shard-size", "{shard_bytes}", "--async-write"],
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
DENSITY = 0.2
"""Of TIES, the paper's: the share of each difference that is kept."""
ROOM_SCALED = 4.25  # base, tuned, patch and output lie on the disk together, in sizes of the model


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


def ties(bench: Bench) -> None:
    """TIES of two fine-tunes, sums in fp32 and rounded once; mergekit's result is what ours is compared with."""
    base, tuned, second, spare = map(bench.place, ("base", "tuned", "second", "second-base"))
    if not second.exists():
        in_child(make, bench.shape, spare, second, None, 1)
        discard(spare)
    merge = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 1.0, "density": DENSITY}} for m in (tuned, second)],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    config, theirs, ours = map(bench.place, ("ties.json", "ties-merged", "ties-ours"))
    config.write_text(json.dumps(merge))
    models = [base, tuned, second]
    call = "import sys, weightlab as wl; b, t, s, out = sys.argv[1:]; wl.merge(b, [t, s], out, method='ties', "
    call += f"parameters={{'density': {DENSITY}}})"
    bench.run("ties", [bench.weightlab[0], "-c", call, *models, ours], models)
    bench.own("start_weightlab", ["status", base], [base])
    bench.run("start_mergekit", [bench.programs["mergekit"], "--help"], [])
    for name in ("default", "async"):
        command: list[str | Path] = [bench.programs["mergekit"], config, theirs, "--quiet", *MERGEKIT_OPTIONS[name]]
        bench.run(f"ties_mergekit_{name}", [*command, "--no-copy-tokenizer"], models)
        if theirs.exists() and ours.exists():
            bench.check("TIES, against mergekit's", in_child(compared, base, [tuned, second], DENSITY, theirs, ours))
        discard(theirs)
    discard(ours)


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
    # On a clean model this only looks for a stack: what it takes is the start of the interpreter and of torch.
    bench.own("start_weightlab", ["status", model], [model])
    bench.own("apply_in_place", ["apply", model, patch, "--in-place"], [model, patch])
    bench.compare("apply --in-place, against the partly tuned", bench.place("partial"), model)
    bench.own("remove_in_place", ["remove", model, patch], [model, patch])
    restored = in_child(digests, model) == clean
    bench.check("remove restored the SHA-256 of every shard", restored)
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
    "ties": ties,
    "apply-out": apply_out,
    "in-place": in_place,
    "diff": diff,
    "reminis": reminis,
}
