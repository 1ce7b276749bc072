"""Computes a tile of a patched tensor from its clean bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from weightlab.encodings import LosslessEncoding
from weightlab.encodings.exact import as_dtype
from weightlab.errors import IntegrityError, NonFiniteError, RangeError, WrongBaseError
from weightlab.files.digest import tensor_hasher
from weightlab.patches.fit import Target
from weightlab.sources import Source
from weightlab.stream.executor import Resources, run
from weightlab.tensors.arithmetic import Faults, add_terms, round_scale
from weightlab.tensors.spec import compute_dtype
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace


@dataclass(slots=True)
class Offences:
    """What went wrong, by tensor, from all threads; raised together."""

    nonfinite: set[str] = field(default_factory=set)
    delta_nonfinite: set[str] = field(default_factory=set)
    overflow: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, target: Target, faults: Faults) -> None:
        with self._lock:
            if faults.input_nonfinite:
                self.nonfinite.add(str(target.spec))
            if faults.delta_nonfinite:
                self.delta_nonfinite.update(f"{target.spec.name} of {t.patch.label}" for t in target.terms)
            if faults.overflow:
                self.overflow.add(str(target.spec))

    def raise_any(self) -> None:
        """Raises:
        NonFiniteError, RangeError: lists every tensor concerned.
        """
        bad = sorted(self.nonfinite | self.delta_nonfinite)
        if bad:
            raise NonFiniteError("NaN or infinity in the weights or the patch", "or pass --allow-nonfinite", bad)
        if self.overflow:
            raise RangeError(
                "the result is too large for the dtype of these tensors",
                "use a smaller scale, or a checkpoint of a wider dtype",
                sorted(self.overflow),
            )


def compute_tile(
    target: Target,
    start: int,
    stop: int,
    clean: Tensor,
    workspace: Workspace,
    offences: Offences,
    allow_nonfinite: bool,
) -> Tensor:
    """The result's bytes (flat uint8) of elements [start, stop).

    What the patches' parts hold in memory for this tensor is given back after its last tile.

    Args:
        clean: the clean tensor's bytes of the same range, shorter where rows are appended, empty for an added tensor.
    """
    result = _computed(target, start, stop, clean, workspace, offences, allow_nonfinite)
    if stop == target.result.stored.numel:
        for term in target.terms:
            term.parts.release()
    return result


def _computed(
    target: Target,
    start: int,
    stop: int,
    clean: Tensor,
    workspace: Workspace,
    offences: Offences,
    allow_nonfinite: bool,
) -> Tensor:
    stored, result = target.spec.stored, target.result.stored
    clean_type, result_type = stored.type.torch, result.type.torch
    assert clean_type is not None and result_type is not None
    count = stop - start
    base = clean.view(clean_type)
    if base.numel() < count:
        padded = workspace.buffer("padded base", count, clean_type)
        padded[: base.numel()].copy_(base)
        padded[base.numel() :].zero_()
        base = padded
    if target.mode in ("restore", "add"):
        term = target.terms[0]
        encoding = cast(LosslessEncoding, term.patch.encoding(term.name))
        base = as_dtype(base, result_type)
        return encoding.restore(term.parts, start, stop, base, workspace).view(torch.uint8)
    terms = [t for t in target.terms if round_scale(t.scale) != 0.0]
    if not terms:
        return base.view(torch.uint8)
    wide = any(torch.float64 in (compute_dtype(target.spec), t.parts.compute) for t in terms)
    compute = torch.float64 if wide else torch.float32
    deltas: list[tuple[float, Tensor]] = []
    for index, term in enumerate(terms):
        delta = workspace.buffer(f"delta {index}", count, compute)
        term.patch.encoding(term.name).decode(term.parts, start, stop, base, delta, workspace)
        deltas.append((round_scale(term.scale), delta))
    out = workspace.buffer("result", count, result_type)
    if workspace.device != "cpu":
        base, deltas = base.to(workspace.device), [(s, d.to(workspace.device)) for s, d in deltas]
    on_device = out if workspace.device == "cpu" else torch.empty_like(out, device=workspace.device)
    faults = add_terms(
        base,
        deltas,
        on_device,
        work=workspace.buffer("work", count, compute, workspace.device),
        product=workspace.buffer("product", count, compute, workspace.device),
        changed=workspace.buffer("changed", count, torch.bool, workspace.device),
        changed_too=workspace.buffer("changed too", count, torch.bool, workspace.device),
        allow_nonfinite=allow_nonfinite,
    )
    if on_device is not out:
        out.copy_(on_device)
    if faults.input_nonfinite or faults.delta_nonfinite or faults.overflow:
        offences.note(target, faults)
    return out.view(torch.uint8)


def read_clean(source: Source, target: Target, start: int, stop: int, workspace: Workspace) -> Tensor:
    """The clean bytes (flat uint8) of elements [start, stop) that exist."""
    if target.mode == "add":
        return workspace.buffer("clean", 0, torch.uint8)
    stored = target.spec.stored
    stop = min(stop, stored.numel)
    raw = workspace.buffer("clean", max(0, stop - start) * stored.type.itemsize, torch.uint8)
    if raw.numel():
        source.read(target.spec.name, start * stored.type.itemsize, raw)
    return raw


def digest_tensors(source: Source, names: Iterable[str], resources: Resources) -> dict[str, str]:
    """The digests of some tensors of a source, the largest first, one thread a tensor."""
    digests: dict[str, str] = {}

    def work(name: str, workspace: Workspace) -> None:
        spec = source.specs[name]
        hasher = tensor_hasher(spec.dtype, spec.shape)
        size = spec.stored.type.itemsize
        for start, stop in tiles(spec.stored.numel):
            raw = workspace.buffer("digest", (stop - start) * size, torch.uint8)
            source.read(name, start * size, raw)
            hasher.update(raw.numpy().data)
        digests[name] = hasher.hexdigest()

    run(sorted(names, key=lambda n: -source.specs[n].nbytes), work, resources)
    return digests


def check_bases(source: Source, targets: Iterable[Target], resources: Resources) -> dict[str, str]:
    """Checks, before anything is written, that every exact patch meets the tensor that it was taken from.

    Returns:
        the digests that were computed, by name.

    Raises:
        WrongBaseError: lists every tensor that is another, with both digests.
    """
    bound = [
        (target.spec.name, term)
        for target in targets
        for term in target.terms
        if target.mode != "add" and term.patch.lossless(term.name) and round_scale(term.scale) != 0.0
    ]
    digests = digest_tensors(source, {name for name, _ in bound}, resources)
    wrong = [
        f"{name}: {term.patch.label} is for {term.record.base_digest}, here is {digests[name]}"
        for name, term in bound
        if term.record.base_digest != digests[name]
    ]
    if wrong:
        raise WrongBaseError(
            f"{source.label} is not the base of an exact patch: {len(wrong)} tensors differ",
            "apply it to its own base; to move a change to another base, store it as dense or low_rank",
            wrong,
        )
    return digests


def check_result(target: Target, digest: str) -> None:
    """Raises:
    IntegrityError: an exact patch did not give the tensor that it should.
    """
    if target.result_digest is not None and digest != target.result_digest:
        raise IntegrityError(
            f"{target.spec.name}: the result's digest is {digest}, and the patch promised {target.result_digest}",
            "report this: it is a bug or failing memory",
        )
