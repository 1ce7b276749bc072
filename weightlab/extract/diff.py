"""The difference of two checkpoints as a patch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from weightlab.extract.encode import encode, find_changed, prepare, write_ready_parts
from weightlab.extract.faults import Faults
from weightlab.extract.job import Job
from weightlab.extract.match import aligned, match_sources, stored_name
from weightlab.extract.options import DiffOptions
from weightlab.extract.pair import TensorPair
from weightlab.extract.records import OPEN_DIGEST, draft, final, header, removed
from weightlab.extract.rules import Rules
from weightlab.files import disk
from weightlab.files.atomic import atomic_file, atomic_folder, refuse_existing
from weightlab.files.digest import fingerprint
from weightlab.patches.compute import digest_tensors
from weightlab.patches.layout import StoredTensor, shard_name
from weightlab.patches.patch import Patch, open_patch
from weightlab.patches.writer import PatchWriter, Spool
from weightlab.sources import Source
from weightlab.tensors.codes import separated, separation
from weightlab.tensors.order import natural_key

__all__ = ["DiffOptions", "diff_sources", "match_sources"]


def diff_sources(base: Source, tuned: Source, out: Path | None, options: DiffOptions) -> Patch:
    """Takes `tuned` − `base` and writes it as a patch.

    Args:
        out: `NAME.safetensors` for one file, any other name for a folder that is sharded at 5 GB; None for temporary
            storage that lasts as long as the returned object.

    Raises:
        NamesMismatchError: the checkpoints do not pair up; all misfits are listed.
        NonFiniteError: lists the tensors with NaN or infinity.
        RangeError: lists the tensors whose delta is too large for how it is to be stored.
        NotPatchableError: there is something at `out`.
    """
    if out is not None:
        refuse_existing(out)
    # Taken out to be written: opening the patch needs the memory again that is taken by what is known of many tensors.
    difference = [_Difference(base, tuned, options)]
    if out is None:
        with disk.storage_errors(tempfile.gettempdir()):
            home = Path(tempfile.mkdtemp(prefix="weightlab-"))
        try:
            difference.pop().write(home / shard_name(0, 1), sharded=False)
            return open_patch(home, temporary=True)
        except BaseException:
            shutil.rmtree(home)
            raise
    with ExitStack() as stack:
        if out.name.endswith(".safetensors"):
            difference.pop().write(stack.enter_context(atomic_file(out)), sharded=False)
        else:
            difference.pop().write(stack.enter_context(atomic_folder(out)), sharded=True)
    return open_patch(out)


class _Difference:
    """The tensors of two checkpoints, paired; what changed is known when it is made."""

    def __init__(self, base: Source, tuned: Source, options: DiffOptions) -> None:
        self.whole = not options.include and not options.exclude
        self.options, self.rules = options, Rules(options.encode)
        self.stored_base, self.stored_tuned = base, tuned
        self.base, self.tuned = aligned(base, tuned)
        pairing = match_sources(self.base, self.tuned, options.allow, options.include, options.exclude)
        names = [*pairing.both, *pairing.added, *pairing.removed]
        self.rules.check_used(names)
        gone, new = set(pairing.removed), set(pairing.added)
        self.removed = [name for name in names if name in gone]
        kept = sorted((name for name in names if name not in gone), key=natural_key)
        self.jobs = [self._job(name, added=name in new) for name in kept]
        find_changed(self.jobs, options.resources)
        if not self.whole:
            self._refuse_halves({*self.base.specs, *self.tuned.specs} - set(names))

    def _refuse_halves(self, left: Collection[str]) -> None:
        """Raises:
        MisfitError: of a module in codes something that changed is chosen, and something else that did is left out.
        """
        changed = [*self.removed, *(job.pair.name for job in self.jobs if job.changed)]
        for codes in (self.base.codes, self.tuned.codes):
            apart = separated(codes, changed, left)
            names = [name for every in apart.values() for name in every]
            before, after = (
                digest_tensors(source, [n for n in names if n in source.specs], self.options.resources)
                for source in (self.base, self.tuned)
            )
            apart = {m: [n for n in every if before.get(n) != after.get(n)] for m, every in apart.items()}
            if any(apart.values()):
                raise separation(self.tuned.label, apart)

    def _job(self, name: str, *, added: bool) -> Job:
        opaque = name in self.base.opaque or name in self.tuned.opaque
        before, after = None if added else self.base.specs[name], self.tuned.specs[name]
        choice = self.rules.choose(before, after, opaque=opaque)
        pair = TensorPair(
            None if added else self.base,
            self.tuned,
            name,
            lossless=choice.encoding.lossless,
            opaque=opaque,
            allow_nonfinite=self.options.allow_nonfinite,
        )
        return Job(pair, choice)

    def write(self, place: Path, *, sharded: bool) -> None:
        """Writes the patch to `place`, which is a file or, when `sharded`, a folder."""
        resources, faults = self.options.resources, Faults(allow_nonfinite=self.options.allow_nonfinite)
        changed = [job for job in self.jobs if job.changed]
        with ExitStack() as stack:
            spool = Spool(place if sharded else place.parent)
            stack.callback(spool.close)
            prepare(changed, self.rules, spool, faults, resources)
            records = {job.pair.name: draft(job) for job in changed}
            records |= {name: removed(self.base, name, OPEN_DIGEST) for name in self.removed}
            sketch = header(records, OPEN_DIGEST, OPEN_DIGEST, self.options)
            writer = PatchWriter(place, {j.pair.name: _stored(j) for j in changed}, sketch, sharded=sharded)
            stack.callback(writer.close)
            del records, sketch  # of many tensors the header takes more memory than all else: it is there once
            writer.require_room()
            writer.begin()
            for job in changed:
                write_ready_parts(job, writer, spool)
            encode(self.jobs if self.whole else changed, writer, faults, resources)
            gone = digest_tensors(self.base, self.removed, resources)
            before, after = self._fingerprints(gone, changed)
            self.jobs.clear()
            known = self.options.base_known
            records = {name: removed(self.base, name, gone[name] if known else None) for name in self.removed}
            while changed:
                job = changed.pop()
                name = job.pair.name
                with faults.gathered():
                    records[name] = final(job, writer.part_records(name), base_known=known)
            faults.raise_any()
            writer.finish(header(records, before, after, self.options))

    def _fingerprints(self, gone: dict[str, str], changed: Sequence[Job]) -> tuple[str | None, str | None]:
        """Of the base and, where the patch gives it bit for bit, the tuned checkpoint.

        Redundant copies of tied tensors, which no job has, belong to them too.
        """
        if not self.whole:
            return self.options.base_fingerprint, None
        before = {stored_name(self.base, name): digest for name, digest in gone.items()}
        after: dict[str, str] = {}
        for job in self.jobs:
            assert job.tuned_digest is not None
            after[stored_name(self.tuned, job.pair.name)] = job.tuned_digest
            if job.base_digest is not None:
                before[stored_name(self.base, job.pair.name)] = job.base_digest
        base_fingerprint = self.options.base_fingerprint
        if self.options.base_known:
            base_fingerprint = self._fingerprint(self.stored_base, before)
        if not all(job.choice.encoding.lossless for job in changed):
            return base_fingerprint, None
        return base_fingerprint, self._fingerprint(self.stored_tuned, after)

    def _fingerprint(self, source: Source, digests: dict[str, str]) -> str:
        missing = [name for name in source.specs if name not in digests]
        return fingerprint(digests | digest_tensors(source, missing, self.options.resources))


def _stored(job: Job) -> StoredTensor:
    assert job.plan is not None
    return StoredTensor(dict(job.plan.parts), job.plan.growing)
