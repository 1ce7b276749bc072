"""A PEFT adapter as a patch: low-rank factors where they suffice, differences where it holds values."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.changes import Change, Product, Values
from weightlab.adapters.reading import Adapter, Network, fp32, read_adapter
from weightlab.errors import NamesMismatchError, NonFiniteError, UnsupportedFormatError, UsageError
from weightlab.files import disk
from weightlab.networks.names import file_views
from weightlab.patches.header import SCHEMA, Base, Created, Method, PatchHeader, Record, features_of
from weightlab.patches.layout import StoredTensor
from weightlab.patches.patch import Patch, open_patch
from weightlab.patches.writer import PatchWriter
from weightlab.sources import Source
from weightlab.tensors.codes import codes_met, refusal
from weightlab.tensors.order import natural_key
from weightlab.tensors.spec import TensorSpec
from weightlab.version import __version__


@dataclass(slots=True)
class _Share:
    """What one of the network's tensors has of a tensor of the files.

    Attributes:
        name: the network's.
        shape: the network's tensor's; None: that of the files' tensor.
        view: which part of it the files' tensor is; None: all.
    """

    name: str
    changes: list[Change]
    shape: tuple[int, ...] | None = None
    view: Tensor | None = None


@dataclass(slots=True)
class _Target:
    """A tensor of the files, as it is and as it becomes."""

    before: TensorSpec
    after: TensorSpec
    shares: list[_Share] = field(default_factory=list)

    @property
    def product(self) -> Product | None:
        """The factors that are all of its change, and take less room than it."""
        changes = [change for share in self.shares for change in share.changes]
        if len(changes) != 1 or not isinstance(changes[0], Product) or self.shares[0].view is not None:
            return None
        factors = changes[0].left.numel() + changes[0].right.numel()
        return changes[0] if factors < self.after.numel else None

    @property
    def encoding(self) -> str:
        return "dense" if self.product is None else "low_rank"

    def parts(self) -> dict[str, TensorSpec]:
        """What is stored of it."""
        if self.product is None:
            return {"delta": TensorSpec("delta", "F32", self.after.shape)}
        factors = {"left": self.product.left, "right": self.product.right}
        return {part: TensorSpec(part, "F32", tuple(tensor.shape)) for part, tensor in factors.items()}


def adapter_patch(folder: Path, base: Source | None, network: Network) -> Patch:
    """Computes the patch that an adapter is, in temporary storage that lasts as long as the returned object.

    Args:
        base: the clean model that it goes on; None: names and shapes are the adapter's own.
        network: makes that model's network without weights, or gives None; only asked where names do not tell.

    Raises:
        UnsupportedFormatError, MalformedFileError: see `read_adapter`.
        NamesMismatchError: lists the tensors that the base lacks, or has in another shape.
        MisfitError: lists tensors that are codes of a quantised checkpoint.
        NonFiniteError: lists tensors with NaN or infinity.
        UsageError: it holds values, and there is no base.
    """
    adapter = read_adapter(folder, network)
    targets = _alone(adapter) if base is None else _targets(adapter, base, network)
    with disk.storage_errors(tempfile.gettempdir()):
        home = Path(tempfile.mkdtemp(prefix="weightlab-"))
    try:
        _write(adapter, targets, base, home)
        return open_patch(home, temporary=True)
    except BaseException:
        shutil.rmtree(home)
        raise


def _alone(adapter: Adapter) -> dict[str, _Target]:
    """Targets under the adapter's own names."""
    lacking = [n for n, changes in adapter.changes.items() if not all(isinstance(c, Product) for c in changes)]
    if lacking:
        raise UsageError(
            f"{adapter.label}: what these become depends on the model", "name the model, with --base", lacking
        )
    targets = {}
    for name, changes in adapter.changes.items():
        (product, *_) = [c for c in changes if isinstance(c, Product)]
        spec = TensorSpec(name, "F32", (product.left.shape[0], product.right.shape[1]))
        targets[name] = _Target(spec, spec, [_Share(name, changes)])
    return targets


def _targets(adapter: Adapter, base: Source, network: Network) -> dict[str, _Target]:
    found: dict[str, _Target] = {}
    missing: list[str] = []
    codes: list[str] = []
    wrong: list[str] = []
    places = _Places(base, network)
    in_codes = codes_met(base, adapter.changes)
    for name, every in adapter.changes.items():
        there = places.of(name)
        if not there and name in in_codes:
            codes.append(name)
            continue
        missing += [] if there else [f"{name}: not in the model"]
        for place in there:
            spec = base.specs[place.stored]
            if place.stored in base.opaque or not spec.is_float:
                codes.append(place.stored)
                continue
            changes = [change for change in every if place.view is not None or not _is_there(change, base, spec)]
            shape = place.shape or spec.shape
            wrong += [f"{place.stored} {list(spec.shape)}: {p}" for change in changes if (p := change.problem(shape))]
            if place.tied and any(isinstance(change, Values) for change in changes):
                missing.append(f"{name}: new values, and the model has it as {place.stored} only, to which it is tied")
            if place.view is not None and any(change.needs_base for change in changes):
                raise UnsupportedFormatError(
                    f"{adapter.label}: new values for {name}, which the files keep in several tensors",
                    "merge it into its model with peft (merge_and_unload), then take a diff",
                )
            if changes:
                target = found.setdefault(place.stored, _Target(spec, spec))
                target.shares.append(_Share(name, changes, place.shape, place.view))
                rows = max((c.values.shape[0] for c in changes if isinstance(c, Values) and c.values.ndim), default=0)
                if rows > (target.after.shape or (0,))[0]:
                    target.after = TensorSpec(place.stored, spec.dtype, (rows, *spec.shape[1:]))
    if codes:
        raise refusal(base, names=codes)
    if missing or wrong:
        raise NamesMismatchError(
            f"{adapter.label} does not fit {base.label}",
            "give the model that it was trained on; a head of its own needs a base that was saved with one",
            [*missing, *wrong],
        )
    return {name: found[name] for name in sorted(found, key=natural_key)}


def _is_there(change: Change, base: Source, spec: TensorSpec) -> bool:
    """Whether these are values that the base has already: peft saves embeddings whole beside what it trained."""
    return (
        isinstance(change, Values)
        and tuple(change.values.shape) == spec.shape
        and torch.equal(fp32(base, spec.name), change.values)
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one of the network's tensors lies in the files: `shape` and `view` as in `_Share`.

    Attributes:
        tied: whether it has no name of its own there.
    """

    stored: str
    shape: tuple[int, ...] | None = None
    view: Tensor | None = None
    tied: bool = False


class _Places:
    """Where the network's tensors lie in a checkpoint's files."""

    def __init__(self, base: Source, network: Network) -> None:
        self._stored = {**{name: name for name in base.specs}, **base.aliases}
        self._network = network
        self._made: Any = None
        self._views: dict[str, list[tuple[str, Tensor]]] = {}
        self._tied: dict[str, str] = {}

    def of(self, name: str) -> list[_Place]:
        """Its places; empty where there is none."""
        if name in self._stored:
            stored = self._stored[name]
            return [_Place(stored, tied=stored != name)]
        self._make()
        views = self._views.get(name, [])
        if views and all(file in self._stored for file, _ in views):
            shape = tuple(self._made.state_dict(keep_vars=True)[name].shape)
            whole = [tuple(view.shape) == shape and view.is_contiguous() for _, view in views]
            return [
                _Place(self._stored[file], shape, None if all_of_it else view)
                for (file, view), all_of_it in zip(views, whole, strict=True)
            ]
        if name in self._tied:
            return [_Place(self._tied[name], tied=True)]
        ends = [stored for stored in self._stored if name.endswith(f".{stored}")]  # a base that was saved without head
        return [_Place(self._stored[max(ends, key=len)])] if ends else []

    def _make(self) -> None:
        if self._made is not None:
            return
        self._made = self._network() or torch.nn.Module()
        for file, (owner, view) in file_views(self._made).items():
            self._views.setdefault(owner, []).append((file, view))
        every = list(self._made.named_parameters(remove_duplicate=False))
        stored = {id(parameter): self._stored[name] for name, parameter in every if name in self._stored}
        self._tied = {name: stored[id(p)] for name, p in every if name not in self._stored and id(p) in stored}


def _write(adapter: Adapter, targets: Mapping[str, _Target], base: Source | None, home: Path) -> None:
    stored = {name: StoredTensor(target.parts()) for name, target in targets.items()}
    records = {name: _record(target) for name, target in targets.items()}
    with closing(PatchWriter(home, stored, _header(adapter, records), sharded=True)) as writer:
        writer.require_room()
        writer.begin()
        bad: list[str] = []
        for name, part, values in _values(targets, base):
            if not bool(torch.isfinite(values).all()):
                bad.append(name)
            writer.append(name, part, values)
        if bad:
            raise NonFiniteError(f"{adapter.label}: NaN or infinity", "get the adapter again", sorted(set(bad)))
        final = {n: r.model_copy(update={"parts": writer.part_records(n)}) for n, r in records.items()}
        writer.finish(_header(adapter, final))


def _values(targets: Mapping[str, _Target], base: Source | None) -> Iterator[tuple[str, str, Tensor]]:
    """(tensor, part, values) of everything that is stored; one whole tensor of the network is in memory at a time."""
    last: tuple[str, Tensor] | None = None
    for name, target in targets.items():
        if target.product is not None:
            yield name, "left", target.product.left
            yield name, "right", target.product.right
            continue
        total = torch.zeros(target.after.shape)
        before = None
        if base is not None and any(change.needs_base for share in target.shares for change in share.changes):
            before = torch.zeros(target.after.shape)
            before[: target.before.shape[0]] = fp32(base, name)
        for share in target.shares:
            if share.view is None:
                for change in share.changes:
                    total = change.onto(total, before)
                continue
            if last is None or last[0] != share.name:  # the next targets are often parts of the same one
                assert share.shape is not None
                whole = torch.zeros(share.shape)
                for change in share.changes:
                    whole = change.onto(whole, None)
                last = share.name, whole
            view = share.view
            total += last[1].as_strided(view.shape, view.stride(), view.storage_offset())
        yield name, "delta", total


def _record(target: _Target) -> Record:
    return Record(
        encoding=target.encoding,
        dtype=target.after.dtype,
        shape=list(target.after.shape),
        parts={},
        base_shape=list(target.before.shape) if target.before.shape != target.after.shape else None,
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
    )
