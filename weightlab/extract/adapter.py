"""An adapter as a patch: low-rank factors where they suffice, differences where it holds values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from weightlab.adapters.changes import Change, Fold, Folded
from weightlab.adapters.opening import open_adapter
from weightlab.adapters.reading import Adapter, Network
from weightlab.errors import NonFiniteError
from weightlab.extract._adapter_places import Places
from weightlab.extract._adapter_targets import AdapterOptions as AdapterOptions
from weightlab.extract._adapter_targets import Share, Target, additions, other_base, renamed, targets_alone, targets_on
from weightlab.extract._added import bits_of, digest_of
from weightlab.files import disk
from weightlab.patches.header import SCHEMA, Base, Created, Method, PatchHeader, Record, features_of
from weightlab.patches.patch import Patch, open_patch
from weightlab.patches.writer import PatchWriter
from weightlab.sources import Source
from weightlab.version import __version__

ALL_OF_IT = AdapterOptions()


def adapter_patch(folder: Path, base: Source | None, network: Network, options: AdapterOptions = ALL_OF_IT) -> Patch:
    """Computes the patch that an adapter is, in temporary storage that lasts as long as the returned object.

    What the user should know of it is in the notes of its header.

    Args:
        base: the clean model that it goes on; None: names and shapes are the adapter's own.
        network: makes that model's network without weights, or gives None; only asked where names do not tell.
        options: which of its tensors are wanted.

    Raises:
        UnsupportedFormatError, MalformedFileError: see `open_adapter`.
        NamesMismatchError: lists the tensors that the base lacks, or has in another shape.
        MisfitError: lists tensors that are codes of a quantised checkpoint.
        NonFiniteError: lists tensors with NaN or infinity.
        UsageError: it holds values, and there is no base; or a pattern matches nothing.
    """
    made = cache(network)
    if base is None:
        adapter = open_adapter(folder, None, made, lambda name: None, options.experts_layout)
        renamed(adapter, options.renames, None)
        places, targets = None, targets_alone(adapter)
    else:
        places = Places(base, made)
        adapter = open_adapter(folder, base, made, places.shape, options.experts_layout)
        renamed(adapter, options.renames, base)
        targets = targets_on(adapter, base, places, options)
        adapter.notes += filter(None, [other_base(adapter, base), additions(targets)])
    if not targets:
        adapter.notes.append("changes nothing: the model has all of its values already")
    with disk.storage_errors(tempfile.gettempdir()):
        home = Path(tempfile.mkdtemp(prefix="weightlab-"))
    try:
        _write(adapter, targets, places, home)
        return open_patch(home, temporary=True)
    except BaseException:
        shutil.rmtree(home)
        raise


def _write(adapter: Adapter, targets: Mapping[str, Target], places: Places | None, home: Path) -> None:
    stored = {name: target.stored() for name, target in targets.items()}
    records = {name: _record(target) for name, target in targets.items()}
    with closing(PatchWriter(home, stored, _header(adapter, records), sharded=True)) as writer:
        writer.require_room()
        writer.begin()
        bad: list[str] = []
        for name, part, values in _values(targets, _Computing(places)):
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                bad.append(name)
            writer.append(name, part, values)
        if bad:
            raise NonFiniteError(f"{adapter.label}: NaN or infinity", "get the adapter again", sorted(set(bad)))
        final = {n: r.model_copy(update={"parts": writer.part_records(n)}) for n, r in records.items()}
        writer.finish(_header(adapter, final))


class _Computing:
    """Differences of the network's tensors, one of them in memory at a time."""

    def __init__(self, places: Places | None) -> None:
        self._places = places
        self._folded: tuple[Fold, dict[str, Tensor]] | None = None

    def delta(self, share: Share, shape: tuple[int, ...]) -> Tensor:
        """What one of the network's tensors gains, of the shape that it gets."""
        total = torch.zeros(shape)
        before: Tensor | None = None
        if any(change.needs_base for change in share.changes):
            before = torch.zeros(shape)
            clean = None if self._places is None else self._places.tensor(share.name)
            if clean is not None:
                before[: clean.shape[0]] = clean if clean.ndim else clean.reshape(())
        for change in share.changes:
            total = self._onto(change, total, before)
        return total

    def _onto(self, change: Change, delta: Tensor, before: Tensor | None) -> Tensor:
        if not isinstance(change, Folded):
            return change.onto(delta, before)
        assert before is not None
        return delta.add_(self._merged(change.fold)[change.own].reshape(delta.shape)).sub_(before)

    def _merged(self, fold: Fold) -> dict[str, Tensor]:
        """Weight and bias come one after the other, from one merge."""
        if self._folded is None or self._folded[0] is not fold:
            assert self._places is not None
            found = {own: self._places.tensor(f"{fold.module}.{own}") for own in ("weight", "bias")}
            self._folded = fold, fold.merged({own: tensor for own, tensor in found.items() if tensor is not None})
        return self._folded[1]


def _values(targets: Mapping[str, Target], computing: _Computing) -> Iterator[tuple[str, str, Tensor]]:
    """(tensor, part, values) of everything that is stored."""
    last: tuple[str, Tensor] | None = None
    for name, target in targets.items():
        if target.before is None:
            for part, bits in bits_of(target.after, target.values):
                yield name, part, bits
            continue
        if target.product is not None:
            yield name, "left", target.product.left
            yield name, "right", target.product.right
            continue
        total = torch.zeros(target.after.shape)
        for share in target.shares:
            if share.view is None:
                total += computing.delta(share, target.after.shape)
                continue
            if last is None or last[0] != share.name:  # the next targets are often parts of the same one
                assert share.shape is not None
                last = share.name, computing.delta(share, share.shape)
            view = share.view
            total += last[1].as_strided(view.shape, view.stride(), view.storage_offset())
        yield name, "delta", total


def _record(target: Target) -> Record:
    before = target.before
    return Record(
        encoding=target.encoding,
        dtype=target.after.dtype,
        shape=list(target.after.shape),
        parts={},
        base_shape=list(before.shape) if before is not None and before.shape != target.after.shape else None,
        added=before is None,
        result_digest=digest_of(target.after, target.values) if before is None else None,
        parameters={} if target.product is None else {"rank": target.product.right.shape[0]},
    )


def _header(adapter: Adapter, records: Mapping[str, Record]) -> PatchHeader:
    return PatchHeader(
        schema=SCHEMA,
        requires=sorted(features_of(records)),
        kind="diff",
        method=Method(name="adapter"),
        base=Base(name=adapter.config.base_name, revision=adapter.config.revision),
        tensors=dict(records),
        created=Created(tool="weightlab", version=__version__),
        notes="; ".join(adapter.notes) or None,
    )
