"""Putting patches on a model: in place, to a new checkpoint, or on a state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

from torch import Tensor

from weightlab.adapters.config import ExpertsLayout
from weightlab.errors import StackError, UsageError
from weightlab.extract.adapter import AdapterOptions
from weightlab.ops.entries import entries_of
from weightlab.ops.grown import carry_vocabulary
from weightlab.ops.new_checkpoint import write_out
from weightlab.ops.operands import ModelLike, PatchesLike, PathLike, base_of, listed
from weightlab.ops.outcome import Outcome, outcome_of
from weightlab.ops.state_dict import patch_state_dict
from weightlab.stack.guards import On
from weightlab.stack.transaction import ChangeOptions, Links, change
from weightlab.stream.executor import Resources
from weightlab.tensors.naming import Renames
from weightlab.tensors.naming import options as options_of
from weightlab.tensors.select import patterns


@overload
def apply(
    model: Mapping[str, Tensor],
    patches: PatchesLike = ...,
    *,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    renames: Renames | None = ...,
    allow: Sequence[str] = ...,
    experts_layout: ExpertsLayout | None = ...,
    allow_nonfinite: bool = ...,
    allow_growth: bool = ...,
    resources: Resources | None = ...,
) -> dict[str, Tensor]: ...


@overload
def apply(
    model: PathLike,
    patches: PatchesLike = ...,
    *,
    out: PathLike | None = ...,
    in_place: bool = ...,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    renames: Renames | None = ...,
    allow: Sequence[str] = ...,
    experts_layout: ExpertsLayout | None = ...,
    key: str | None = ...,
    links: Links = ...,
    allow_nonfinite: bool = ...,
    allow_growth: bool = ...,
    wait: float = ...,
    dry_run: bool = ...,
    resources: Resources | None = ...,
) -> Outcome: ...


def apply(
    model: ModelLike,
    patches: PatchesLike = (),
    *,
    out: PathLike | None = None,
    in_place: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    allow: Sequence[str] = (),
    experts_layout: ExpertsLayout | None = None,
    key: str | None = None,
    links: Links = "refuse",
    allow_nonfinite: bool = False,
    allow_growth: bool = False,
    wait: float = 0.0,
    dry_run: bool = False,
    resources: Resources | None = None,
) -> Outcome | dict[str, Tensor]:
    """Applies patches: every touched tensor becomes round(W₀ + Σ scale·Δ), computed from its clean bytes.

    Args:
        model: a checkpoint's path, or a state dict.
        patches: paths as `PATH[@SCALE]`, or patches such as `0.5 * patch`; one or several. With none, `out` gets a copy
            of the model as safetensors.
        out: where the new checkpoint goes: a folder, or `NAME.safetensors` for a model of one file.
        in_place: change the checkpoint itself; `remove` takes patches off again, bit for bit.
        include, exclude: globs over the model's tensor names.
        renames: {old: new} from the patch's tensor names to the model's, see `rename`; "auto" infers it, and what it
            finds is what the stack records.
        allow: `"added"`: tensors of an adapter that the model lacks, such as a head, are added to it.
        experts_layout: how the experts lie in an adapter's `lora_B`, where it does not say so.
        key: where in a pickle the state dict lies.
        allow_growth: whether a patch may add far more bytes than it has.
        links, allow_nonfinite, wait, dry_run: see `ChangeOptions`.

    Returns:
        what was done; for a state dict a new dict, in which tensors that no patch touches are the same objects.

    Raises:
        StackError: a patch is on already, or is given twice.
        MisfitError: the patches do not fit; every offender is listed, and nothing was written.
    """
    unknown = sorted(set(patterns(allow)) - {"added"})
    if unknown:
        raise UsageError(f"allow={', '.join(unknown)} is not known here", 'give "added", or nothing')
    resources = resources or Resources()
    base = base_of(model, key=key, wait=wait, resources=resources)
    added = "added" in patterns(allow)
    adapters = AdapterOptions(patterns(include), patterns(exclude), renames or {}, added, experts_layout)
    entries = entries_of(patches, base, adapters)
    if isinstance(model, Mapping):
        if out is not None or in_place:
            raise UsageError("a state dict has no place on disk", "leave out `out` and `in_place`")
        wanted = [entry for _, entry in entries]
        return patch_state_dict(model, wanted, resources, allow_nonfinite=allow_nonfinite, allow_growth=allow_growth)
    if (out is not None) == in_place:
        raise UsageError("say where the result goes", "either --out PATH or --in-place")
    options = ChangeOptions(links, allow_nonfinite, wait, dry_run, resources)

    def decide(on: Sequence[On]) -> list[On]:
        return joined(model, on, entries)

    if in_place:
        done = outcome_of(model, change(Path(model), decide, options), dry_run)
    else:
        assert out is not None
        grown = carry_vocabulary(model, Path(out), entries, listed(patches))
        done = write_out(model, Path(out), decide, key, options, grown.files, allow_growth=allow_growth)
        done.notes += grown.notes
    if renames == "auto":
        taken = [(name, entry.renames) for name, entry in entries if entry.renames]
        done.notes += [f"{name}: names were mapped: {options_of(rules)}" for name, rules in taken]
    done.notes += [
        f"{name}: {entry.patch.header.notes}"
        for name, entry in entries
        if entry.patch.path is None and entry.patch.header.notes
    ]
    return done


def joined(model: PathLike, current: Sequence[On], new: Sequence[On]) -> list[On]:
    """What is on and what comes to it.

    Raises:
        StackError: lists the patches that are on already.
    """
    on = {entry.patch.id for _, entry in current}
    twice = [name for name, entry in new if entry.patch.id in on]
    if twice:
        raise StackError(
            f"{os.fspath(model)}: a patch is on already",
            f"change its strength: weightlab scale {os.fspath(model)} PATCH SCALE",
            twice,
        )
    return [*current, *new]
