"""Reports of the library as text for people; used by several commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlab_cli.output import Output, size

if TYPE_CHECKING:
    from weightlab.ops.inspect import Inspection
    from weightlab.ops.outcome import Outcome, PatchOnInfo


def show_stack(output: Output, model: str, patches: list[PatchOnInfo]) -> None:
    """What is on a model."""
    if not patches:
        output.line(f"{model}: no patch is on")
        return
    rows = [[p.name, f"{p.scale:g}", p.id[:12]] for p in patches]
    output.table(["patch", "#scale", "id"], rows, f"on {model}")


def show_outcome(output: Output, outcome: Outcome) -> None:
    """What a change of a model did."""
    output.result(outcome)
    would = "would be " if outcome.dry_run else ""
    done = f"{outcome.tensors} tensors {would}computed, {size(outcome.bytes_written)} written"
    if outcome.bytes_copied:
        done += f", {size(outcome.bytes_copied)} copied"
    output.line(done)
    for note in outcome.notes:
        output.line(note)
    for name in outcome.left_out:
        output.line(f"left out: {name} (the same weights in another format, without the patch)")
    show_stack(output, outcome.out or outcome.model, outcome.patches)


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
        *([["licence", facts["license"]]] if facts["license"] else []),
        *([["notes", facts["notes"]]] if facts["notes"] else []),
        *([["needs", ", ".join(facts["requires"])]] if facts["requires"] else []),
        ["largest relative error", f"{facts['largest_relative_error']:.3g}"],
    ]
    output.table(["", ""], rows, found.path)
    output.line()
    stored = [
        [name, str(held["tensors"]), size(held["bytes"]), size(held["full_bytes"])]
        for name, held in facts["encodings"].items()
    ]
    output.table(["encoding", "#tensors", "#stored", "#in full"], stored)
    output.line()


_NORMS = ("#norm", "#rms", "#largest", "#relative")


def _norms(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.4g}" for value in values]


def _bad(count: int | None) -> str:
    return str(count) if count else ""
