"""Checkpoints that are computed while they are read: with patches on, or the sum of patches alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightlab.patches.compute import Offences, compute_tile, read_clean
from weightlab.patches.fit import Fit
from weightlab.patches.parts import StoredParts
from weightlab.patches.patch import Patch
from weightlab.sources import Source
from weightlab.sources.virtual.computed import tiles_of_read
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.workspace import WorkspaceOfThread


class PatchedSource:
    """A checkpoint with patches on it. Computed by whole tiles: reads that begin at a multiple of `TILE` waste nothing.

    Args:
        base: the clean checkpoint; not closed by this one.
        fitted: what the patches do to it.

    Raises (on reading):
        NonFiniteError, RangeError: a result cannot be stored.
    """

    def __init__(self, base: Source, fitted: Fit, *, allow_nonfinite: bool = False) -> None:
        self._base, self._targets, self._allow = base, fitted.targets, allow_nonfinite
        self._own = WorkspaceOfThread()
        self.label: str = base.label
        self.path: Path | None = base.path
        kept = {n: t.result for n, t in fitted.targets.items() if t.mode != "remove"}
        gone = fitted.targets.keys() - kept.keys()
        self.specs: Mapping[str, TensorSpec] = {n: s for n, s in base.specs.items() if n not in gone} | kept
        self.aliases: Mapping[str, str] = {a: n for a, n in base.aliases.items() if n not in gone}
        self.opaque: frozenset[str] = base.opaque & self.specs.keys()
        self.codes: Mapping[str, Code] = {n: c for n, c in base.codes.items() if n in self.specs}

    def read(self, name: str, start: int, out: Tensor) -> None:
        target = self._targets.get(name)
        if target is None:
            self._base.read(name, start, out)
            return
        for first, last, inside, piece in tiles_of_read(self.specs[name], start, out):
            offences = Offences()
            clean = read_clean(self._base, target, first, last, self._own.workspace)
            result = compute_tile(target, first, last, clean, self._own.workspace, offences, self._allow)
            offences.raise_any()
            piece.copy_(result[inside])

    def close(self) -> None:
        """Nothing of its own to give back."""


class DeltaSource:
    """Σ scale·Δ of patches as tensors of the compute dtype: fp32, or fp64 for fp64 tensors.

    Args:
        patches: each with its scale; added in the order of their ids.
        base: their base; needed where a patch is exact.
        names: the tensors that it has.
    """

    def __init__(self, patches: Sequence[Patch], base: Source | None, names: Sequence[str]) -> None:
        ordered = sorted(patches, key=lambda p: p.id)
        self._base = base
        self._own = WorkspaceOfThread()
        self._terms: dict[str, list[tuple[Patch, StoredParts]]] = {
            n: [(p, p.parts(n)) for p in ordered if n in p.records] for n in names
        }
        self.label: str = " + ".join(p.label for p in ordered)
        self.path: Path | None = None
        self.specs: Mapping[str, TensorSpec] = {n: self._spec(n) for n in names}
        self.aliases: Mapping[str, str] = {}
        self.opaque: frozenset[str] = frozenset()
        self.codes: Mapping[str, Code] = {}

    def _spec(self, name: str) -> TensorSpec:
        terms = self._terms[name]
        wide = any(parts.compute == torch.float64 for _, parts in terms)
        return TensorSpec(name, "F64" if wide else "F32", terms[0][0].records[name].spec(name).shape)

    def read(self, name: str, start: int, out: Tensor) -> None:
        dtype = self.specs[name].type
        assert dtype.torch is not None
        for first, last, inside, piece in tiles_of_read(self.specs[name], start, out):
            total = self._own.workspace.buffer("total", last - first, dtype.torch)
            total.zero_()
            delta = self._own.workspace.buffer("delta", last - first, dtype.torch)
            for patch, parts in self._terms[name]:
                base = self._read_base(name, patch, first, last)
                patch.encoding(name).decode(parts, first, last, base, delta, self._own.workspace)
                total.add_(delta if patch.exact_scale == 1.0 else delta.mul_(patch.exact_scale))
                if last == self.specs[name].stored.numel:
                    parts.release()
            piece.copy_(total.view(torch.uint8)[inside])

    def _read_base(self, name: str, patch: Patch, first: int, last: int) -> Tensor:
        if not patch.encoding(name).lossless:
            return torch.empty(0)
        assert self._base is not None
        stored = self._base.aliases.get(name, name)
        spec = self._base.specs[stored]
        dtype = spec.type
        assert dtype.torch is not None
        raw = self._own.workspace.buffer("base", (last - first) * dtype.itemsize, torch.uint8)
        held = max(0, min(last, spec.numel) - first) * dtype.itemsize
        raw[held:].zero_()
        self._base.read(stored, first * dtype.itemsize, raw[:held])
        return raw.view(dtype.torch)

    def close(self) -> None:
        """Nothing of its own to give back."""
