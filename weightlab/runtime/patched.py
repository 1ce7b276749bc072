"""Patches on an `nn.Module` in memory: put on, changed, and taken off again to the very bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from weightlab.adapters.reading import Network
from weightlab.errors import StackError
from weightlab.extract.adapter import AdapterOptions
from weightlab.networks.names import file_tensors
from weightlab.ops.entries import entries_of
from weightlab.ops.new_checkpoint import checked_fit
from weightlab.ops.operands import PatchesLike, PatchLike, open_patches
from weightlab.patches.compute import Offences, compute_tile, read_clean
from weightlab.patches.fit import StackEntry, Target
from weightlab.patches.patch import Patch
from weightlab.sources import Source
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources, run
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.naming import Renames
from weightlab.tensors.select import patterns
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace

_in_use: WeakSet[nn.Module] = WeakSet()


class PatchStack:
    """The patches that are on a module.

    Every touched tensor is always round(clean + Σ scale·Δ), terms in the order of the patch ids, computed from a copy
    of its clean bits: the same bits as on disk, whatever came on and off before. Parameters and buffers stay the same
    objects; their values are changed in place.

    Args:
        module: patches go by the names of its checkpoint's files, which for modules of transformers are mapped to the
            module's; for others they are the names of its state dict.
        renames: {old: new} from the patches' tensor names to those, see `weightlab.apply`; "auto" infers it.
        include, exclude: globs over those names.

    Raises:
        StackError: another stack is on the module.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        renames: Renames | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        allow_nonfinite: bool = False,
        resources: Resources | None = None,
    ) -> None:
        if module in _in_use:
            raise StackError("another stack of patches is on this module", "add to that one, or close it first")
        self._module = module
        self._options = AdapterOptions(patterns(include), patterns(exclude), renames or {})
        self._allow, self._resources = allow_nonfinite, resources or Resources()
        self._entries: list[StackEntry] = []
        self._clean: dict[str, Tensor] = {}
        self._recipes: dict[str, object] = {}
        _in_use.add(module)

    @property
    def patches(self) -> list[Patch]:
        """The patches that are on, each with its scale, in the order of their ids."""
        return [entry.patch.at(entry.scale) for entry in self._entries]

    def add(self, patches: PatchesLike) -> None:
        """Puts patches on.

        Raises:
            StackError: one is on already; use `set`.
            MisfitError: they do not fit; everything is as before.
        """
        new = [entry for _, entry in entries_of(patches, self._base, self._options)]
        there = {e.patch.id for e in self._entries}
        twice = [e.patch.label for e in new if e.patch.id in there]
        if twice:
            raise StackError("a patch is on already", "change its strength with `set`", twice)
        self._become([*self._entries, *new])

    def set(self, patch: PatchLike, scale: float) -> None:
        """Changes the strength of a patch that is on, or puts it on with that strength."""
        ((_, entry),) = entries_of([patch], self._base, self._options)
        new = round_scale(scale)
        kept = [replace(e, scale=new) if e.patch.id == entry.patch.id else e for e in self._entries]
        if all(e.patch.id != entry.patch.id for e in self._entries):
            kept.append(replace(entry, scale=new))
        self._become(kept)

    def remove(self, patch: PatchLike) -> None:
        """Takes a patch off.

        Raises:
            StackError: it is not on.
        """
        (opened,) = open_patches([patch], self._base, self._options)
        kept = [e for e in self._entries if e.patch.id != opened.id]
        if len(kept) == len(self._entries):
            raise StackError(f"{opened.label} is not on", "see `patches`", [p.label for p in self.patches])
        self._become(kept)

    def clear(self) -> None:
        """Takes all patches off; every bit is as at first."""
        self._become([])

    def close(self) -> None:
        """Takes all patches off and lets go of the module."""
        self.clear()
        _in_use.discard(self._module)

    @contextmanager
    def _base(self) -> Iterator[tuple[Source, Network]]:
        """What adapters are opened with: the clean tensors, and the module itself as the network."""
        yield self._source(file_tensors(self._module)), lambda: self._module

    def _source(self, state: Mapping[str, Tensor]) -> MemorySource:
        return MemorySource(dict(state) | self._clean_of(state), label=type(self._module).__name__)

    def _become(self, entries: Sequence[StackEntry]) -> None:
        """Makes these patches those that are on. An error leaves the module as it is."""
        entries = sorted(entries, key=lambda e: e.patch.id)
        state = file_tensors(self._module)
        source = self._source(state)
        targets = checked_fit(source, entries, self._resources).targets if entries else {}
        wrong = [f"{n}: would come, go, or change size or dtype" for n, t in targets.items() if _reshapes(t)]
        if wrong:
            raise StackError(
                "a module keeps its tensors as they are", "apply the patch to a state dict or on disk", wrong
            )
        recipes = {n: [(t.mode, x.patch.id, x.name, x.scale) for x in t.terms] for n, t in targets.items()}
        changed = [n for n in {**self._recipes, **recipes} if self._recipes.get(n) != recipes.get(n)]
        fresh = {n: state[n].clone() for n in changed if n not in self._clean}
        clean = self._clean | fresh
        results = self._compute(source, [targets[n] for n in changed if n in targets])
        for name in changed:
            _overwrite(state[name], results[name] if name in results else clean[name])
        torch.clear_autocast_cache()  # which would go on with 16-bit copies of what the weights were
        self._clean = {n: t for n, t in clean.items() if n in targets}
        self._recipes, self._entries = dict(recipes), list(entries)

    def _clean_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clean copies under every name that their tensors go by."""
        owners = {n: t.data_ptr() for n, t in state.items() if n in self._clean and t.numel()}
        by_place = {place: self._clean[name] for name, place in owners.items()}
        return {n: by_place[t.data_ptr()] for n, t in state.items() if t.numel() and t.data_ptr() in by_place}

    def _compute(self, source: MemorySource, targets: Sequence[Target]) -> dict[str, Tensor]:
        made = {t.spec.name: t.spec.empty() for t in targets}
        offences = Offences()

        def tasks() -> Iterator[tuple[Target, int, int]]:
            for target in targets:
                for start, stop in tiles(target.spec.stored.numel):
                    yield target, start, stop

        def work(task: tuple[Target, int, int], workspace: Workspace) -> None:
            target, start, stop = task
            clean = read_clean(source, target, start, stop, workspace)
            result = compute_tile(target, start, stop, clean, workspace, offences, self._allow)
            begin = start * target.spec.stored.type.itemsize
            made[target.spec.name].reshape(-1).view(torch.uint8)[begin : begin + result.numel()] = result

        run(tasks(), work, self._resources)
        offences.raise_any()
        return made


def _reshapes(target: Target) -> bool:
    return target.mode in ("add", "remove") or target.result != target.spec


def _overwrite(tensor: Tensor, values: Tensor) -> None:
    """Copies values into a tensor in place; the same dtype, so bits are copied as they are."""
    with torch.no_grad():
        tensor.copy_(values)


def patches_for(module: nn.Module, patches: PatchesLike) -> list[Patch]:
    """Opens patches that are to go on a module, PEFT adapters too."""

    @contextmanager
    def base() -> Iterator[tuple[Source, Network]]:
        yield MemorySource(file_tensors(module), label=type(module).__name__), lambda: module

    return open_patches(patches, base)


@contextmanager
def patched(
    module: nn.Module,
    patches: PatchesLike = (),
    *,
    renames: Renames | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    resources: Resources | None = None,
) -> Iterator[PatchStack]:
    """Patches on a module for the length of a block; leaving it, also by an exception, restores the very bits.

    with wl.patched(model, [0.7 * p, q]) as stack:
        stack.set(p, 0.3)
    """
    stack = PatchStack(
        module,
        renames=renames,
        include=include,
        exclude=exclude,
        allow_nonfinite=allow_nonfinite,
        resources=resources,
    )
    try:
        stack.add(patches)
        yield stack
    finally:
        stack.close()
