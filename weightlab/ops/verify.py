"""Checking every byte: a patch against its digests and its base, a checkpoint against what is on it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from weightlab.errors import UsageError, WrongBaseError
from weightlab.files.digest import fingerprint
from weightlab.ops.operands import ModelLike, PathLike, model_path, reading
from weightlab.patches.compute import digest_tensors
from weightlab.patches.patch import Patch, is_patch, open_patch
from weightlab.sources import Source
from weightlab.sources.local import LocalSource
from weightlab.stack.guards import clean_view, state_of
from weightlab.stream.executor import Resources


@dataclass(slots=True)
class Verified:
    """What was checked and found right.

    Attributes:
        kind: "patch" or "checkpoint".
        identity: the patch's id, or the checkpoint's fingerprint as it is now.
        clean: fingerprint of the checkpoint without the patches that are on it; None where none is.
        tensors, bytes: how many were read.
    """

    path: str
    kind: str
    identity: str
    clean: str | None = None
    tensors: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


def verify(
    path: PathLike,
    *,
    base: ModelLike | None = None,
    key: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Verified:
    """Reads a patch or a checkpoint whole and checks every digest that is known of it.

    Args:
        base: for a patch: the checkpoint that it should have been taken from.

    Raises:
        IntegrityError: lists every part or tensor that is damaged, or was changed by something else.
        WrongBaseError: `base` is not the patch's base; lists every tensor that is another.
    """
    resources = resources or Resources()
    if Path(path).exists() and is_patch(Path(path)):
        patch = open_patch(path)
        patch.verify(resources)
        found = Verified(os.fspath(path), "patch", patch.id, None, len(patch.records), patch.nbytes())
        if base is not None:
            with reading(base, key=key, wait=wait) as source:
                found.notes.append(_check_base(patch, source, resources))
        return found
    if base is not None and model_path(path):
        raise UsageError(f"{os.fspath(path)} is a checkpoint, and --base is for a patch", "leave out --base")
    with reading(model_path(path), key=key, wait=wait) as source:
        return _checkpoint(os.fspath(path), source, resources)


def _checkpoint(path: str, source: Source, resources: Resources) -> Verified:
    with clean_view(source, resources) as (_, on):
        digests = digest_tensors(source, source.specs, resources)
        found = Verified(path, "checkpoint", fingerprint(digests), None, len(digests))
        found.bytes = sum(spec.nbytes for spec in source.specs.values())
        if not on or not isinstance(source, LocalSource):
            return found
        touched = state_of(source).tensors
        for _, entry in on:
            entry.patch.verify(resources)
        found.clean = fingerprint(digests | {name: known.clean for name, known in touched.items()})
        found.notes.append(f"{len(on)} patches are on; their files and the kept clean bytes are whole")
    return found


def _check_base(patch: Patch, source: Source, resources: Resources) -> str:
    expected = {n: r.base_digest for n, r in patch.records.items() if r.base_digest is not None}
    whole = patch.header.base.fingerprint
    missing = [
        f"{name}: not in {source.label}" for name in expected if source.aliases.get(name, name) not in source.specs
    ]
    if missing:
        raise WrongBaseError(
            f"{source.label} is not the base of {patch.label}", "find the checkpoint it was taken from", missing
        )
    names = set(source.specs) if whole is not None else {source.aliases.get(n, n) for n in expected}
    digests = digest_tensors(source, sorted(names), resources)
    wrong = [
        f"{name}: {patch.label} is for {digest}, here is {digests[source.aliases.get(name, name)]}"
        for name, digest in expected.items()
        if digests[source.aliases.get(name, name)] != digest
    ]
    if not wrong and whole is not None and fingerprint(digests) != whole:
        wrong = [f"fingerprint: {patch.label} is for {whole}, here is {fingerprint(digests)}: other tensors differ"]
    if wrong:
        raise WrongBaseError(
            f"{source.label} is not the base of {patch.label}", "find the checkpoint it was taken from", wrong
        )
    if not expected and whole is None:
        return f"the patch does not say what its base was, so {source.label} could not be compared"
    return f"{source.label} is its base"
