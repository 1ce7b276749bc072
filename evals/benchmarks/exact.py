"""Measures the `exact` encoding on real pairs, beside reminis's lossless pack; --help says what and how."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from _environment import REMINIS, cache_folder, ensure_environment, machine, versions
from _pairs import PAIRS, Pair, Weights, in_bf16
from _report import on, replace_between_markers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.encodings.exact import decode_block, encode_block
from weightlab.tensors.spec import BY_TORCH
from weightlab.tensors.tiles import tiles

TARGETS = {"fp32": 0.80, "bf16": 0.92}
Bytes = NDArray[np.uint8]


def blocks(pair: Pair) -> Iterator[tuple[Bytes, Bytes, str]]:
    """(base, tuned, dtype) of what the codec is given: the blocks of the tensors that differ."""
    for name, tensor in pair[1].items():
        kind = BY_TORCH[tensor.dtype]
        base, tuned = (octets(weights[name]) for weights in pair)
        if not np.array_equal(base, tuned):
            for start, stop in tiles(tensor.numel()):
                part = slice(start * kind.itemsize, stop * kind.itemsize)
                yield base[part], tuned[part], kind.name


def octets(tensor: torch.Tensor) -> Bytes:
    """The bytes of a tensor, flat."""
    found: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def codec(pair: Pair, repeat: int) -> dict[str, float]:
    """How long one core takes from memory to memory, each the best of `repeat` passes; and for how many bytes."""
    given = list(blocks(pair))
    encoding, decoding = [], []
    for _ in range(repeat):
        begun = time.perf_counter()
        coded = [encode_block(base, tuned, dtype) for base, tuned, dtype in given]
        encoding.append(time.perf_counter() - begun)
        frames = [[np.frombuffer(frame, dtype=np.uint8) for frame in block] for block in coded]
        begun = time.perf_counter()
        for (base, _, dtype), block in zip(given, frames, strict=True):
            decode_block(base, block, dtype)
        decoding.append(time.perf_counter() - begun)
    changed = sum(len(tuned) for _, tuned, _ in given)
    return {"changed_bytes": changed, "encode_seconds": min(encoding), "decode_seconds": min(decoding)}


def measured(pair: Pair, interpreter: Path, work: Path, repeat: int) -> dict[str, Any]:
    """Sizes and times of one pair.

    Raises:
        click.ClickException: the patch does not give the tuned model bit for bit.
    """
    base, tuned, patch, out = (work / f"{name}.safetensors" for name in ("base", "tuned", "patch", "out"))
    for path, weights in zip((base, tuned), pair, strict=True):
        save_file(weights, path)
    ours, theirs = [], []
    for _ in range(repeat):
        patch.unlink(missing_ok=True)
        begun = time.perf_counter()
        made = wl.diff(base, tuned, patch, encode="exact")
        ours.append(time.perf_counter() - begun)
        command = [str(interpreter), str(Path(__file__).with_name("_reminis_pack.py")), str(base), str(tuned)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        theirs.append(json.loads(found.splitlines()[-1]))
    wl.apply(base, patch, out=out)
    if not same(load_file(out), pair[1]):
        raise click.ClickException("the patch does not give the tuned model")
    out.unlink()
    return {
        "tuned_bytes": sum(tensor.nbytes for tensor in pair[1].values()),
        "exact": {"stored_bytes": made.nbytes(), "file_bytes": patch.stat().st_size, "diff_seconds": min(ours)},
        "reminis": theirs[0] | {"diff_seconds": min(run["diff_seconds"] for run in theirs)},
        **codec(pair, repeat),
    }


def same(found: Weights, expected: Weights) -> bool:
    """Whether names, dtypes, shapes and all bits are the same."""
    if found.keys() != expected.keys():
        return False
    pairs = [(found[name], tensor) for name, tensor in expected.items()]
    return all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(octets(a), octets(b)) for a, b in pairs)


def table(result: Mapping[str, Any]) -> str:
    """Everything a reader of the README should see, as Markdown; pairs of one kind in one row."""
    known = result["versions"]
    lines = [
        f"`exact` and reminis {known['reminis']}'s lossless pack: the bytes of the tensors (without the patch's header "
        "and the pages of reminis's database), and of the files as they lie on the disk. The codec's speed is that of "
        "one core, from memory to memory; a diff goes from files to a file. Taken on "
        f"{on(result['machine'])}; Python {known['python']}, numpy {known['numpy']}, zstandard {known['zstandard']}.",
        "",
        "| tuned | MB | exact MB | reminis MB | exact / reminis: tensors | files | target | encode MB/s | decode MB/s "
        "| diff s | reminis diff s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["pairs"]:
        groups.setdefault((row["name"].partition(" ")[0], row["dtype"]), []).append(row)
    for (name, dtype), rows in groups.items():
        ours, theirs = ([row[tool] for row in rows] for tool in ("exact", "reminis"))
        several = f", {len(rows)} pairs" if len(rows) > 1 else ""
        changed = total(rows, "changed_bytes")
        cells = [
            f"{name} {dtype}{several}",
            f"{total(rows, 'tuned_bytes') / 1e6:.2f}",
            *(f"{total(tool, 'stored_bytes') / 1e6:.2f}" for tool in (ours, theirs)),
            *(compared(ours, theirs, number, TARGETS[dtype]) for number in ("stored_bytes", "file_bytes")),
            f"≤ {TARGETS[dtype]:.2f}",
            *(f"{changed / total(rows, number) / 1e6:.0f}" for number in ("encode_seconds", "decode_seconds")),
            *(f"{total(tool, 'diff_seconds'):.2f}" for tool in (ours, theirs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def total(rows: Sequence[Mapping[str, Any]], number: str) -> float:
    """The sum of one number of every row."""
    return sum(float(row[number]) for row in rows)


def compared(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], number: str, target: float) -> str:
    """The ratio of all together, the largest of a single pair, and whether a pair missed the target."""
    every = [mine[number] / other[number] for mine, other in zip(ours, theirs, strict=True)]
    largest = f" (at most {max(every):.3f})" if len(every) > 1 else ""
    return f"{total(ours, number) / total(theirs, number):.3f}{largest}{' (missed)' if max(every) > target else ''}"


HELP = f"""Measure the `exact` encoding on real models and their fine-tunes, beside reminis {REMINIS}'s lossless pack.

The pairs: CHGNet 0.3.0 and r2scan; the eight ANI-1x networks and ANI-1ccx; MiniLM and a fine-tune of it, which is
made the first time (needs transformers, takes minutes). Each in fp32 and rounded to bf16. Wheels, the fine-tune
and reminis's environment are kept in $WEIGHTLAB_CACHE/benchmarks, or ~/.cache/weightlab/benchmarks.

Each patch is applied, and must give the tuned model bit for bit. Targets are shown beside the results.

\b
Examples:
  python evals/benchmarks/exact.py --json exact.json --readme README.md
  python evals/benchmarks/exact.py --repeat 1 --only CHGNet
"""


@click.command(help=HELP)
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Runs of each; the best counts.")
@click.option("--only", multiple=True, type=click.Choice([*PAIRS]), help="Just this pair; repeatable.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that came out.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the table between its markers.")
def main(repeat: int, only: tuple[str, ...], json_path: Path | None, readme: Path | None) -> None:
    """Measures pair by pair, reports."""
    if readme:
        replace_between_markers(readme, "exact", "")  # fails now rather than after minutes
    interpreter = ensure_environment(f"reminis-{REMINIS}", [[f"reminis=={REMINIS}"]]) / "python"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        for name in only or PAIRS:
            pair = PAIRS[name]()
            for dtype, weights in (("fp32", pair), ("bf16", in_bf16(pair))):
                click.echo(f"{name} {dtype} ...", err=True)
                rows.append({"name": name, "dtype": dtype} | measured(weights, interpreter, Path(folder), repeat))
        result = {
            "schema_version": 1,
            "machine": machine(Path(folder)),
            "versions": versions("weightlab", "numpy", "torch", "zstandard") | {"reminis": REMINIS},
            "repeat": repeat,
            "targets": TARGETS,
            "pairs": rows,
        }
    text = table(result)
    click.echo(text)
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    if readme:
        readme.write_text(replace_between_markers(readme, "exact", text))


if __name__ == "__main__":
    main()
