"""One change of what is on a checkpoint: from the lock to the last sync (the order is that of `journal`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from weightlab.errors import (
    InputError,
    IntegrityError,
    MisfitError,
    MissingInputError,
    NotPatchableError,
    WeightlabError,
    WrongBaseError,
)
from weightlab.files import disk
from weightlab.files.lock import folder_lock
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import StackEntry, Target, fit
from weightlab.patches.patch import Patch
from weightlab.sources.local import LocalSource, open_anchor
from weightlab.stack import journal
from weightlab.stack.clean import CleanSource
from weightlab.stack.elsewhere import refuse_elsewhere
from weightlab.stack.garbage import collect
from weightlab.stack.guards import (
    REMEDY,
    On,
    check_kept,
    check_unchanged,
    folder_of,
    place_of,
    recover_all,
    unreadable,
)
from weightlab.stack.keeping import Digests, Keep, keep_clean, offsets, store, sync_kept
from weightlab.stack.links import linked_files, own_copies
from weightlab.stack.records import Intent, PatchOn, StackState, Touched, text_of
from weightlab.stack.signals import uninterrupted
from weightlab.stack.state import (
    ORIGINALS,
    PATCHES,
    STACK,
    StatePlace,
    damaged_patches,
    kept_entries,
    record_of,
)
from weightlab.stream.executor import Resources

Links: TypeAlias = Literal["refuse", "copy"]
Decide: TypeAlias = Callable[[Sequence[On]], Sequence[On]]


@dataclass(frozen=True, slots=True)
class ChangeOptions:
    """How a change in place is made.

    Attributes:
        links: what to do about a shard that is a symbolic link or has other hard links: refuse, or give the checkpoint
            a copy of its own first. It is never written through.
        wait: seconds to wait for another process.
        dry_run: check and compute everything, write nothing.
    """

    links: Links = "refuse"
    allow_nonfinite: bool = False
    wait: float = 0.0
    dry_run: bool = False
    resources: Resources = field(default_factory=Resources)


@dataclass(slots=True)
class Changed:
    """What a change did: the state afterwards, tensors computed anew, bytes written, and what to tell the user."""

    state: StackState
    tensors: int = 0
    bytes_written: int = 0
    notes: list[str] = field(default_factory=list)


def change(path: Path, decide: Decide, options: ChangeOptions) -> Changed:
    """Makes the patches that are on a checkpoint those that `decide` returns, in place, whole or not at all.

    Args:
        path: a safetensors file, or a folder with one or with shards and their index.
        decide: gets what is on (after recovery) and returns what shall be on; its errors leave everything as it is.

    Raises:
        NotPatchableError: this checkpoint, or this change of it, cannot be made in place.
        IntegrityError: the files are not as weightlab left them; nothing is written.
        BusyError, StorageError, MisfitError and others: see `fit` and `results`; everything is as before.
    """
    folder = folder_of(path)
    if not folder.is_dir():
        raise MissingInputError(f"{path}: no such file or folder", "check the path")
    with folder_lock(folder, exclusive=not options.dry_run, wait=options.wait) as checkpoint:
        notes = [] if options.dry_run else recover_all(checkpoint, options.resources)
        place = place_of(path, checkpoint)
        try:
            source = open_anchor(path, checkpoint.path / place.anchor)
        except InputError as error:
            if place.read_stack().patches:
                raise unreadable(path, place, error) from error
            raise
        try:
            changed = _Change(path, place, source, options).make(decide)
        finally:
            source.close()
    changed.notes[:0] = notes
    return changed


class _Change:
    """The steps of one change, with what they share."""

    def __init__(self, path: Path, place: StatePlace, source: LocalSource, options: ChangeOptions) -> None:
        self.path, self.place, self.source, self.options = path, place, source, options
        self.state = place.read_stack()

    def make(self, decide: Decide) -> Changed:
        if not self.state.patches:
            refuse_elsewhere(self.path, self.source)
        check_unchanged(self.path, self.source, self.state, self.options.resources)
        entries, damaged = kept_entries(self.place, self.state)
        current = [(on.name, entry) for on, entry in zip(self.state.patches, entries, strict=True)]
        wanted = sorted(decide(current), key=lambda on: on[1].patch.id)
        records = [record_of(entry, name) for name, entry in wanted]
        if any(record not in self.state.patches for record in records):
            refuse_elsewhere(self.path, self.source)  # taking off what went on last is right, whatever else is on
        if records == self.state.patches:
            return Changed(self.state, notes=["nothing to change"])
        needed = {record.id: damaged[record.id] for record in records if record.id in damaged}
        if needed:
            raise damaged_patches(self.place, self.state, needed)
        clean = CleanSource(self.source, self.place, self.state.tensors)
        try:
            before = self._recorded(clean, entries) if not damaged else {}
            fitted = fit(clean, [entry for _, entry in wanted])
            if fitted.reshapes:
                raise NotPatchableError(
                    f"{self.path}: tensors would change size or dtype, or come or go, which cannot be done in place",
                    "write a new checkpoint with --out",
                    [str(fitted.targets[n].result) for n in fitted.reshapes],
                )
            rewrite = self._rewrite(before, fitted.targets)
            self._refuse_links(rewrite)
            patches = {t.patch.id: t.patch for target in rewrite for t in target.terms}
            for patch in patches.values():
                patch.verify(self.options.resources)
            self._check_bases(clean, rewrite)
            if self.options.dry_run:
                return self._rehearse(clean, rewrite, records)
            return self._perform(clean, rewrite, records, fitted.targets, [e.patch for _, e in wanted])
        finally:
            clean.close()

    def _recorded(self, clean: CleanSource, entries: Sequence[StackEntry]) -> dict[str, Target]:
        """What made the touched tensors what they are; what is not in it is computed anew."""
        try:
            return fit(clean, entries).targets
        except MisfitError:  # the configuration was changed since and allows less now: it may still come off
            return {}

    def _check_bases(self, clean: CleanSource, rewrite: Sequence[Target]) -> None:
        try:
            check_bases(clean, rewrite, self.options.resources)
        except WrongBaseError:  # or is it that the kept bytes are not the base any more?
            names = [t.spec.name for t in rewrite if t.spec.name in self.state.tensors]
            check_kept(self.path, clean, self.state, names, self.options.resources)
            raise

    def _rewrite(self, before: dict[str, Target], after: dict[str, Target]) -> list[Target]:
        """The tensors whose terms change, in the order of their places; what is touched no more becomes clean."""
        names = [
            n
            for n in {**self.state.tensors, **after}
            if n not in before or n not in self.state.tensors or _recipe(before[n]) != _recipe(after.get(n))
        ]
        names.sort(key=lambda n: (self.source.file_of[n], self.source.entry(n).offset))
        specs = self.source.specs
        return [after.get(n) or Target(specs[n], specs[n], "sum", []) for n in names]

    def _shards(self, rewrite: Sequence[Target]) -> list[str]:
        return sorted({self.source.file_of[t.spec.name] for t in rewrite})

    def _linked(self, rewrite: Sequence[Target]) -> list[str]:
        return linked_files(self.place.checkpoint, self._shards(rewrite))

    def _refuse_links(self, rewrite: Sequence[Target]) -> None:
        linked = self._linked(rewrite)
        if linked and self.options.links == "refuse":
            raise NotPatchableError(
                f"{self.path}: files of it are symbolic links or have other names, and would change there too",
                "give this checkpoint its own copies with --links copy, or write a new one with --out",
                linked,
            )

    def _rehearse(self, clean: CleanSource, rewrite: Sequence[Target], records: list[PatchOn]) -> Changed:
        self._require_room(rewrite, [])
        self._compute(clean, rewrite)
        state = self.state.model_copy(update={"patches": records})
        return Changed(state, len(rewrite), self._bytes(rewrite), ["nothing was written (dry run)"])

    def _bytes(self, rewrite: Sequence[Target]) -> int:
        new = sum(t.spec.nbytes for t in rewrite if t.spec.name not in self.state.tensors)
        return new + sum(t.spec.nbytes for t in rewrite)

    def _require_room(self, rewrite: Sequence[Target], patches: Sequence[Patch]) -> None:
        folder = self.place.checkpoint.path
        kept = sum(t.spec.nbytes for t in rewrite if t.spec.name not in self.state.tensors)
        on = {record.id for record in self.state.patches}
        with disk.storage_errors(folder):
            device = os.stat(folder).st_dev
            files = [os.stat(f) for p in patches if p.id not in on for f in p.files.values()]
            sizes = {s: os.stat(folder / s).st_size for s in self._shards(rewrite)}
        copied = [f.st_size for f in files if f.st_dev != device]
        linked = sum(sizes[s] for s in self._linked(rewrite))
        disk.require_room(folder, kept + sum(copied) + linked, max([kept, *copied, *sizes.values()], default=0))

    def _check(self, rewrite: Sequence[Target], found: Digests) -> None:
        damaged = [
            t.spec.name
            for t in rewrite
            if t.spec.name in self.state.tensors and found[t.spec.name][0] != self.state.tensors[t.spec.name].clean
        ]
        wrong = [
            t.spec.name for t in rewrite if t.result_digest is not None and found[t.spec.name][1] != t.result_digest
        ]
        if damaged:
            raise IntegrityError(f"{self.path}: kept clean bytes are damaged", REMEDY.format(self.path), damaged)
        if wrong:
            raise IntegrityError(
                f"{self.path}: an exact patch did not give what it promises", "check the memory and the disk", wrong
            )

    def _perform(
        self,
        clean: CleanSource,
        rewrite: Sequence[Target],
        records: list[PatchOn],
        targets: dict[str, Target],
        patches: Sequence[Patch],
    ) -> Changed:
        place, options = self.place, self.options
        known: CleanSource | None = None
        try:
            self._require_room(rewrite, patches)
            found = self._keep(clean, rewrite, patches)
            new = self._new_state(records, targets, found)
            own = own_copies(place, self._linked(rewrite))
            sync_kept(place)
            intent = Intent(new=new, shards=self._shards(rewrite), rewrite=[t.spec.name for t in rewrite])
            known = CleanSource(self.source, place, {**new.tensors, **self.state.tensors})
            journal.begin(place, intent)
            expected = {name: digests[1] for name, digests in found.items()}
            journal.write_shards(
                place, self.source, known, rewrite, expected, options.resources, allow_nonfinite=options.allow_nonfinite
            )
            with uninterrupted():
                journal.commit(place, new)
                journal.finish(place, intent)
        except BaseException as error:
            with uninterrupted():
                self._go_back(error)
            raise
        finally:
            if known is not None:
                known.close()
        return Changed(new, len(rewrite), self._bytes(rewrite), own)

    def _go_back(self, error: BaseException) -> None:
        try:
            if journal.recover(self.place, self.options.resources) is None:  # it had not begun
                collect(self.place)
        except WeightlabError as second:
            second.remedy += f" (the change was undone because: {error}); then run `weightlab status {self.path}`"
            raise second from error

    def _keep(self, clean: CleanSource, rewrite: Sequence[Target], patches: Sequence[Patch]) -> Digests:
        """Step 2 and half of 3: computes every result, keeps the clean bytes of newly touched tensors, and patches."""
        file = f"{self.state.sequence + 1}.bin"
        self._originals = offsets([t for t in rewrite if t.spec.name not in self.state.tensors], file)
        with ExitStack() as stack:
            folder = stack.enter_context(self.place.made())
            originals, kept = (stack.enter_context(folder.made(name)) for name in (ORIGINALS, PATCHES))
            if folder.kind(STACK) is None:  # so that kept bytes are never found without a record
                folder.replace(STACK, text_of(self.state))
            found = keep_clean(originals, file, self._originals, lambda keep: self._compute(clean, rewrite, keep))
            for patch in patches:
                store(kept, patch)
        return found

    def _compute(self, clean: CleanSource, rewrite: Sequence[Target], keep: Keep | None = None) -> Digests:
        options = self.options
        found = journal.results(clean, rewrite, options.resources, allow_nonfinite=options.allow_nonfinite, keep=keep)
        self._check(rewrite, found)
        return found

    def _new_state(self, records: list[PatchOn], targets: dict[str, Target], found: Digests) -> StackState:
        tensors: dict[str, Touched] = {}
        for name in targets:
            known = self.state.tensors.get(name)
            if name in found:
                original = known.original if known is not None else self._originals[name]
                clean, now = found[name]
                tensors[name] = Touched(clean=clean, now=now, file=self.source.file_of[name], original=original)
            elif known is not None:
                tensors[name] = known
            else:
                raise AssertionError(f"{name} is touched and was not computed")
        headers = {t.file: self.source.headers[t.file].digest for t in tensors.values()}
        counted = self.place.empty_state().model_copy(update={"sequence": self.state.sequence + 1})
        return counted.model_copy(update={"patches": records, "tensors": tensors, "headers": headers})


def _recipe(target: Target | None) -> object:
    if target is None:
        return None
    return target.mode, [(t.patch.id, t.name, t.scale) for t in target.terms]
