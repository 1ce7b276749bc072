"""What a checkpoint or a patch holds: totals, a row a tensor, a row a layer with norms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from weightlab.errors import UsageError
from weightlab.extract.adapter import AdapterOptions
from weightlab.ops.moments import Moments, moments
from weightlab.ops.naming import told, under_patch_names
from weightlab.ops.operands import (
    ModelLike,
    PathLike,
    adapter_at,
    adapters_beside,
    base_of,
    model_path,
    names_patch,
    open_patches,
    reading,
)
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource
from weightlab.sources import Source, cautions_of
from weightlab.stream.executor import Resources
from weightlab.tensors.naming import Renames
from weightlab.tensors.order import layer_of, natural_key
from weightlab.tensors.spec import TensorSpec


@dataclass(slots=True)
class TensorRow:
    """One tensor. `norm`: of the weights, or of a patch's Δ; `relative`: ‖Δ‖ / ‖W‖, where the base is given."""

    name: str
    dtype: str
    shape: list[int]
    parameters: int
    bytes: int
    encoding: str | None = None
    norm: float | None = None
    rms: float | None = None
    largest: float | None = None
    nonzero: int | None = None
    nonfinite: int | None = None
    relative: float | None = None
    relative_error: float | None = None


@dataclass(slots=True)
class LayerRow:
    """All tensors of one layer together."""

    layer: str
    tensors: int
    parameters: int
    bytes: int
    norm: float | None = None
    rms: float | None = None
    largest: float | None = None
    nonzero: int | None = None
    nonfinite: int | None = None
    relative: float | None = None


@dataclass(slots=True)
class Inspection:
    """What was found.

    Attributes:
        kind: "checkpoint" or "patch".
        facts: for a patch, what its header says.
        full_bytes: what the tensors take (for a patch: those that it changes, in full).
    """

    path: str
    kind: str
    tensors: list[TensorRow]
    layers: list[LayerRow]
    parameters: int
    bytes: int
    full_bytes: int
    dtypes: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect(
    path: PathLike | Patch,
    *,
    base: ModelLike | None = None,
    renames: Renames | None = None,
    key: str | None = None,
    norms: bool = True,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Inspection:
    """Looks at a checkpoint or a patch; norms are streamed.

    Args:
        base: for a patch: its base. Gives norms relative to the weights, and those of exact patches.
        renames: {old: new} from the patch's tensor names to the base's, see `rename`; "auto" infers it.
        norms: read the tensors; without, headers only.

    Raises:
        WrongBaseError, NamesMismatchError: `base` is not the base of the patch.
    """
    resources = resources or Resources()
    if names_patch(path):
        options = AdapterOptions(renames=renames or {})
        (patch,) = open_patches(path, base_of(base, key=key, wait=wait, resources=resources), options)
        if renames and base is None:
            raise UsageError("--map is from a patch's names to its base's", "give --base")
        # An adapter that was opened with its base has the base's names.
        renames = None if adapter_at(path) is not None else renames
        return _patch(patch, base, renames, key, norms, wait, resources)
    assert not isinstance(path, Patch)
    if renames:
        raise UsageError(f"{path} is a checkpoint, and --map is for a patch", "leave it out")
    if base is not None and model_path(path):
        raise UsageError(
            f"{path} is a checkpoint, and --base is for a patch", "take a difference with `weightlab diff`"
        )
    with reading(path, key=key, wait=wait) as source:
        names = sorted(source.specs, key=natural_key)
        summable = [n for n in names if n not in source.opaque and source.specs[n].is_float]
        found = moments(source, summable, resources) if norms else {}
        rows = [row_of(source.specs[n], source.specs[n].nbytes, found.get(n)) for n in names]
        result = summarise(os.fspath(path), "checkpoint", rows, sum(r.bytes for r in rows), found, {})
        result.notes += [note for note in (codes_note(source),) if note]
        if source.aliases:
            result.notes.append(f"tied: {', '.join(f'{a} = {n}' for a, n in sorted(source.aliases.items()))}")
        result.notes += [*adapters_beside(path), *cautions_of(source)]
        return result


def codes_note(source: Source) -> str:
    """How many tensors are codes, and of which kinds; empty where none is."""
    kinds = sorted({code.kind for code in source.codes.values()})
    return f"{len(source.codes)} tensors are codes and their scales, without norms: {'; '.join(kinds)}" if kinds else ""


def _patch(
    patch: Patch,
    base: ModelLike | None,
    renames: Renames | None,
    key: str | None,
    norms: bool,
    wait: float,
    resources: Resources,
) -> Inspection:
    names = sorted(patch.records, key=natural_key)
    specs = {n: patch.records[n].spec(n) for n in names}
    notes: list[str] = []
    found: dict[str, Moments] = {}
    weights: dict[str, Moments] = {}
    with ExitStack() as stack:
        source = None if base is None else stack.enter_context(reading(base, key=key, wait=wait))
        if source is not None:
            source, taken = under_patch_names(source, patch, renames)
            notes += told(taken if renames == "auto" else {})
            check_bases(source, fit(source, [StackEntry(patch, 1.0)]).targets.values(), resources)
        summable = [n for n in names if has_delta(patch, n, source)]
        if norms:
            found = moments(DeltaSource([patch.at(1.0)], source, summable), summable, resources)
            if source is not None:
                stored = {n: source.aliases.get(n, n) for n in summable}
                measured = moments(source, sorted(set(stored.values())), resources)
                weights = {n: measured[s] for n, s in stored.items()}
            elif any(patch.encoding(n).lossless for n in names if patch.records[n].encoding != "removed"):
                notes.append("the change of an exact tensor is known with its base only: give --base")
    rows = []
    for name in names:
        record = patch.records[name]
        row = row_of(specs[name], patch.nbytes(name), found.get(name))
        row.encoding = record.encoding
        row.relative_error = record.error.relative_l2 if record.error else None
        if name in weights and weights[name].norm:
            row.relative = found[name].norm / weights[name].norm
        rows.append(row)
    full = sum(specs[n].nbytes for n in names if patch.records[n].encoding != "removed")
    result = summarise(patch.label, "patch", rows, full, found, weights)
    result.facts, result.notes = _facts(patch), notes
    return result


def has_delta(patch: Patch, name: str, base: Source | None) -> bool:
    """Whether a patch's tensor has a change that can be told as numbers, with what is known of its base."""
    record = patch.records[name]
    if record.encoding == "removed" or record.added or not record.spec(name).is_float:
        return False
    if base is not None and base.aliases.get(name, name) in base.opaque:
        return False
    return base is not None or not patch.encoding(name).lossless


def _facts(patch: Patch) -> dict[str, Any]:
    header = patch.header
    encodings: dict[str, dict[str, int]] = {}
    for name, record in header.tensors.items():
        held = encodings.setdefault(record.encoding, {"tensors": 0, "bytes": 0, "full_bytes": 0})
        held["tensors"] += 1
        held["bytes"] += patch.nbytes(name)
        held["full_bytes"] += 0 if record.encoding == "removed" else record.spec(name).nbytes
    errors = [r.error.relative_l2 for r in header.tensors.values() if r.error is not None]
    return {
        "id": patch.id,
        "kind": header.kind,
        "method": header.method.model_dump(),
        "base": header.base.model_dump(),
        "result": header.result.fingerprint if header.result else None,
        "scale": header.scale,
        "requires": header.requires,
        "encodings": encodings,
        "largest_relative_error": max(errors, default=0.0),
        "license": header.license,
        "created": header.created.model_dump() if header.created else None,
        "notes": header.notes,
    }


def row_of(spec: TensorSpec, size: int, found: Moments | None) -> TensorRow:
    """A tensor's row; `size`: stored bytes."""
    row = TensorRow(spec.name, spec.dtype, list(spec.shape), spec.numel, size)
    if found is not None:
        row.norm, row.rms, row.largest = found.norm, found.rms, found.largest
        row.nonzero, row.nonfinite = found.changed, found.nonfinite
    return row


def summarise(
    path: str,
    kind: str,
    rows: list[TensorRow],
    full: int,
    found: Mapping[str, Moments],
    weights: Mapping[str, Moments],
) -> Inspection:
    """Totals and layers from rows, the moments of what is looked at, and those of the weights it is relative to."""
    groups: dict[str, list[TensorRow]] = {}
    dtypes: dict[str, int] = {}
    for row in rows:
        groups.setdefault(layer_of(row.name), []).append(row)
        dtypes[row.dtype] = dtypes.get(row.dtype, 0) + 1
    layers = [_layer(layer, members, found, weights) for layer, members in groups.items()]
    parameters, size = sum(r.parameters for r in rows), sum(r.bytes for r in rows)
    return Inspection(path, kind, rows, layers, parameters, size, full, dtypes)


def _layer(
    layer: str, members: Sequence[TensorRow], found: Mapping[str, Moments], weights: Mapping[str, Moments]
) -> LayerRow:
    row = LayerRow(layer, len(members), sum(m.parameters for m in members), sum(m.bytes for m in members))
    total, whole = Moments(), Moments()
    known = [m.name for m in members if m.name in found]
    for name in known:
        total.add(found[name])
        whole.add(weights.get(name, Moments()))
    if known:
        row.norm, row.rms, row.largest = total.norm, total.rms, total.largest
        row.nonzero, row.nonfinite = total.changed, total.nonfinite
        row.relative = total.norm / whole.norm if whole.norm else None
    return row
