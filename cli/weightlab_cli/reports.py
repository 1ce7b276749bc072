"""Reports of the library as text for people; used by several commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from weightlab_cli.output import Output, size

if TYPE_CHECKING:
    from weightlab.ops.adapter_out import Exported, LoraExport
    from weightlab.ops.inspect import Inspection
    from weightlab.ops.outcome import Outcome, PatchOnInfo
    from weightlab.ops.similarity import Comparison
    from weightlab.stream.executor import Resources


def show_stack(output: Output, model: str, patches: list[PatchOnInfo]) -> None:
    """What is on a model."""
    if not patches:
        output.line(f"{model}: no patch is on")
        return
    rows = [[p.name, f"{p.scale:g}", p.id[:12]] for p in patches]
    output.table(["patch", "#scale", "id"], rows, f"on {model}")


def show_outcome(output: Output, outcome: Outcome, resources: Resources) -> None:
    """What a change of a model did."""
    from weightlab.ops.companions import reason_of

    dry = outcome.dry_run
    output.result(outcome, **({"memory": resources.expected_memory()} if dry else {}))
    done = f"{outcome.tensors} tensors {'to compute' if dry else 'computed'}, {size(outcome.bytes_written)}"
    done += " to write" if dry else " written"
    if outcome.bytes_copied:
        done += f", {size(outcome.bytes_copied)} {'to copy' if dry else 'copied'}"
    if outcome.tensors or outcome.bytes_copied or not outcome.notes:  # else the notes say it all
        output.line(done)
    _show_memory(output, resources, dry)
    for note in outcome.notes:
        output.line(note)
    for name in outcome.left_out:
        output.line(f"left out: {name} ({reason_of(Path(outcome.model), name)})")
    show_stack(output, outcome.out or outcome.model, outcome.patches)


def show_patch(output: Output, out: str, found: Inspection, resources: Resources, *, dry_run: bool) -> None:
    """A patch that was made, or in a dry run would have been."""
    more = {"dry_run": True, "memory": resources.expected_memory()} if dry_run else {"dry_run": False}
    sizes = {"tensors": len(found.tensors), "bytes": found.bytes, "full_bytes": found.full_bytes}
    output.result({"path": out, **found.facts, **sizes}, **more)
    _show_encodings(output, found)
    _show_error(output, found)
    _show_memory(output, resources, dry_run)
    end = "would be " if dry_run else ""
    output.line(f"{out}: {end}{len(found.tensors)} tensors, {size(found.bytes)}, id {found.facts['id'][:12]}")


def show_adapter(output: Output, title: str, done: LoraExport) -> None:
    """A LoRA adapter that was written: what it holds, and what not."""
    groups: dict[str, list[Exported]] = {}
    for each in done.tensors:
        groups.setdefault(each.how, []).append(each)
    rows = []
    for how, members in groups.items():
        share = math.sqrt(sum(e.share**2 for e in members if math.isfinite(e.share)))
        worst = max((e.residual for e in members if math.isfinite(e.residual)), default=0.0)
        ranks = f"{min(e.rank for e in members)} to {max(e.rank for e in members)}" if members[0].rank else ""
        rows.append([how, str(len(members)), ranks, f"{share:.1%}", f"{worst:.3g}"])
    output.table(["as", "#tensors", "#rank", "#of ‖Δ‖", "#largest residual"], rows, title)
    for note in done.notes:
        output.line(note)
    output.line(f"{done.out}: rank {done.rank}, residual {done.residual:.3g} of ‖Δ‖")


def show_reading(output: Output, found: list[Inspection], resources: Resources) -> None:
    """What a command that only reads would read."""
    rows = [{"path": f.path, "kind": f.kind, "tensors": len(f.tensors), "bytes": f.bytes} for f in found]
    output.result({"dry_run": True, "read": rows, "memory": resources.expected_memory()})
    for f in found:
        output.line(f"{f.path}: a {f.kind}, {len(f.tensors)} tensors, {size(f.bytes)} to read")
    _show_memory(output, resources, True)


def show_layers(output: Output, found: Inspection) -> None:
    """A row a layer."""
    rows = [
        [r.layer, str(r.tensors), f"{r.parameters:,}", size(r.bytes), *_norms(r.norm, r.rms, r.largest, r.relative)]
        + [_bad(r.nonfinite)]
        for r in found.layers
    ]
    output.table(["layer", "#tensors", "#parameters", "#bytes", *_NORMS, "#NaN, inf"], rows)


def show_tensors(output: Output, found: Inspection) -> None:
    """A row a tensor."""
    rows = [
        [r.name, r.encoding or r.dtype, "×".join(map(str, r.shape)) or "scalar", size(r.bytes)]
        + _norms(r.norm, r.rms, r.largest, r.relative)
        + [_bad(r.nonfinite), "" if r.relative_error is None else f"{r.relative_error:.3g}"]
        for r in found.tensors
    ]
    kind = "encoding" if found.kind == "patch" else "dtype"
    output.table(["tensor", kind, "shape", "#bytes", *_NORMS, "#NaN, inf", "#error"], rows)


def show_facts(output: Output, found: Inspection) -> None:
    """What the header of a patch says."""
    if not found.facts:
        return
    facts = found.facts
    base = facts["base"]
    rows = [
        ["id", facts["id"]],
        ["kind", f"{facts['kind']} ({facts['method']['name']})"],
        ["base", " ".join(str(base[k]) for k in ("name", "revision", "fingerprint") if base[k]) or "not recorded"],
        ["result", facts["result"] or "depends on the base"],
        *([["scale", f"{facts['scale']:g}"]] if facts["scale"] != 1 else []),
        *([["licence", facts["license"]]] if facts["license"] else []),
        *([["notes", facts["notes"]]] if facts["notes"] else []),
        *([["needs", ", ".join(facts["requires"])]] if facts["requires"] else []),
    ]
    output.table(["", ""], rows, found.path)
    output.line()
    _show_encodings(output, found)
    _show_error(output, found)
    output.line()


def _show_encodings(output: Output, found: Inspection) -> None:
    rows = [
        [name, str(held["tensors"]), size(held["bytes"]), size(held["full_bytes"])]
        for name, held in found.facts["encodings"].items()
    ]
    output.table(["encoding", "#tensors", "#stored", "#in full"], rows)


def _show_error(output: Output, found: Inspection) -> None:
    output.line(f"largest relative error of a tensor: {found.facts['largest_relative_error']:.3g}")


def _show_memory(output: Output, resources: Resources, wanted: bool) -> None:
    if wanted:
        output.line(f"about {size(resources.expected_memory())} of memory, with {resources.workers()} threads")


_NORMS = ("#norm", "#rms", "#largest", "#relative")


def _norms(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.4g}" for value in values]


def _bad(count: int | None) -> str:
    return str(count) if count else ""


def show_comparison(output: Output, found: Comparison) -> None:
    """The matrix of cosines, norms, and a row a layer: cosines where there are two, else each one's share."""
    output.result(found)
    numbers = [str(i + 1) for i in range(len(found.labels))]
    relative = [""] * len(numbers) if found.relative is None else [f"{part:.4g}" for part in found.relative]
    rows = [
        [number, label, f"{norm:.4g}", part, *(f"{c:+.4f}" for c in cosines)]
        for number, label, norm, part, cosines in zip(
            numbers, found.labels, found.norms, relative, found.cosines, strict=True
        )
    ]
    output.table(["#", "", "#norm", "#relative", *(f"#cos {n}" for n in numbers)], rows, f"{found.compared}:")
    two = len(numbers) == 2
    heads = ["layer", *(["#cosine"] if two else []), *(f"#share of {n}" for n in numbers)]
    output.table(
        heads,
        [
            [r.layer, *([f"{r.cosines[0][1]:+.4f}"] if two else []), *(f"{share:.1%}" for share in r.shares)]
            for r in found.layers
        ],
    )
    for note in found.notes:
        output.line(note)
