"""Reports of the library as text for people; used by several commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightlab_cli.output import Output, size

if TYPE_CHECKING:
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
