"""Whether a set of patches fits a checkpoint, and what it does to each tensor; all misfits are found at once."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from weightlab.errors import MisfitError, NamesMismatchError, StackError
from weightlab.patches.header import Record
from weightlab.patches.parts import StoredParts
from weightlab.patches.patch import Patch
from weightlab.patches.ties import Copies
from weightlab.sources import Source
from weightlab.tensors.codes import codes_met, refusal, separated, separation
from weightlab.tensors.naming import Found, infer, options, other_norm, remedy, with_norms
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import matches, rename, select
from weightlab.tensors.spec import TensorSpec

Mode = Literal["sum", "restore", "add", "remove"]


@dataclass(frozen=True, slots=True)
class StackEntry:
    """A patch on a checkpoint: its scale, and which of its tensors are used under which names."""

    patch: Patch
    scale: float
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)

    def targets(self, others: Collection[str] = ()) -> dict[str, str]:
        """{name in the checkpoint: name in the patch}, in natural order.

        Args:
            others: more names of the checkpoint, which `exclude` may mean: a tied tensor that would follow.
        """
        renamed = rename(self.patch.records, self.renames)
        names = list(renamed.values())
        beside = [e for e in self.exclude if any(matches(o, [e]) for o in others)]
        exclude = [e for e in self.exclude if e not in beside or any(matches(n, [e]) for n in names)]
        kept = set(select(names, self.include, exclude))
        return {t: n for n, t in sorted(renamed.items(), key=lambda i: natural_key(i[1])) if t in kept}


@dataclass(slots=True)
class Term:
    """One patch's share in one tensor."""

    patch: Patch
    name: str
    scale: float
    parts: StoredParts

    @property
    def record(self) -> Record:
        return self.patch.records[self.name]


@dataclass(slots=True)
class Target:
    """What becomes of one tensor of the checkpoint.

    Attributes:
        spec: as it is stored clean; for an added tensor, what it will be.
        result: as it will be stored; equal to `spec` where only values change.
        mode: "sum": clean + Σ scale·Δ; "restore": the tuned bits of an exact patch; "add"; "remove".
        terms: in the order of the patch ids.
    """

    spec: TensorSpec
    result: TensorSpec
    mode: Mode
    terms: list[Term]
    opaque: bool = False

    @property
    def result_digest(self) -> str | None:
        """What the result must be, where the header says so."""
        return self.terms[0].record.result_digest if self.mode in ("restore", "add") else None


@dataclass(slots=True)
class Fit:
    """Every tensor that the patches touch, and which of those follow the tensor that they are a copy of."""

    targets: dict[str, Target] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)

    @property
    def reshapes(self) -> list[str]:
        """Tensors that change size, dtype or existence: what cannot be done in place."""
        return [n for n, t in self.targets.items() if t.mode in ("add", "remove") or t.result != t.spec]


def fit(source: Source, entries: Sequence[StackEntry]) -> Fit:
    """Works out what a set of patches does to a checkpoint; reads headers only.

    Args:
        source: the clean checkpoint.

    Raises:
        StackError: a patch is there twice, or patches exclude one another on a tensor.
        NamesMismatchError: lists every tensor that is missing in the checkpoint, or has another shape or dtype.
        MisfitError: lists every operation that is not defined on its tensor.
    """
    entries = sorted(entries, key=lambda e: e.patch.id)
    twice = [e.patch.label for e, f in itertools.pairwise(entries) if e.patch.id == f.patch.id]
    if twice:
        raise StackError("a patch is given twice", "change its strength with `weightlab scale` instead", twice)
    result = Fit()
    misfits: list[str] = []
    undefined: list[str] = []
    coded: dict[str, None] = {}
    for entry in entries:
        taken: dict[str, str] = {}
        targets = entry.targets(source.specs)
        _refuse_halves(source, entry, targets)
        met = codes_met(source, targets)
        present: dict[str | None, list[str]] = {}  # {digest of what it was taken from: names in the patch}
        for target, name in targets.items():
            if source.aliases.get(target, target) in source.specs:
                present.setdefault(entry.patch.records[name].base_digest, []).append(name)
        for target, name in targets.items():
            stored = source.aliases.get(target, target)
            if stored in taken:  # one patch, two names of one tied tensor: the same change counts once
                if not _same_change(entry.patch, taken[stored], name):
                    misfits.append(
                        f"{target}: tied to {stored} here, and {entry.patch.label} changes the two differently"
                    )
                continue
            if stored not in source.specs and _twin(entry.patch, name, present):
                continue  # tied: the checkpoint stores once what the patch's own base stored twice
            if target in met and not _keeps_codes(source, stored, entry, name):
                coded[target] = None
                continue
            taken[stored] = name
            _add(result, source, stored, entry, name, misfits, undefined)
        for copy, original in _copies(source, taken, entry.exclude).items():
            result.followers[copy] = original
            _add(result, source, copy, entry, taken[original], misfits, undefined)
    if coded:
        raise refusal(source, names=coded)
    if misfits:
        _tell_renaming(source, entries)
        raise NamesMismatchError(
            f"{len(misfits)} tensors do not fit {source.label}",
            "check that the patch is for this architecture; rename prefixes with --map OLD=NEW, or choose tensors with "
            "--include and --exclude",
            misfits,
        )
    if undefined:
        raise MisfitError(f"not possible on {source.label}", "leave these tensors out with --exclude", undefined)
    for target_ in result.targets.values():
        _settle(target_, undefined)
    if undefined:
        raise StackError("these patches exclude one another", "use one of them, or leave tensors out", undefined)
    _refuse_two_spellings(source, result)
    return result


def _refuse_two_spellings(source: Source, result: Fit) -> None:
    """Raises:
    NamesMismatchError: a norm's `weight` would come beside its `gamma`, of which a loader takes only one.
    """
    gone = {name for name, target in result.targets.items() if target.mode == "remove"}
    stay = {*source.specs, *source.aliases} - gone
    twice = {
        name: other
        for name, target in result.targets.items()
        if target.mode == "add" and (other := other_norm(name)) in stay
    }
    if twice:
        rules = {f".{'.'.join(n.split('.')[-2:])}": f".{'.'.join(str(o).split('.')[-2:])}" for n, o in twice.items()}
        raise NamesMismatchError(
            f"{source.label} has these norms under their other names, and both in one model are never meant",
            f"take the difference again, with {options(rules)}",
            [f"{name}: would be added beside {other}" for name, other in twice.items()],
        )


def _refuse_halves(source: Source, entry: StackEntry, targets: Mapping[str, str]) -> None:
    """Raises:
    MisfitError: the patch has all that changed of a module in codes, and some of it is left out.
    """
    if source.codes:
        every = rename(entry.patch.records, entry.renames).values()
        stored = {source.aliases.get(name, name): name for name in every}
        chosen = [name for name, target in stored.items() if target in targets]
        left = separated(source.codes, chosen, [name for name, target in stored.items() if target not in targets])
        if left:
            raise separation(entry.patch.label, left)


def _keeps_codes(source: Source, stored: str, entry: StackEntry, name: str) -> bool:
    """Whether a patch only puts bits in place of a code's."""
    record, spec = entry.patch.records[name], source.specs.get(stored)
    if spec is None:
        return record.added
    before = record.base_spec(stored)
    if before is not None and before.dtype != spec.dtype:
        return False
    if record.encoding == "removed":
        return True
    return entry.scale in (0.0, 1.0) and entry.patch.encoding(name).lossless


def patch_names(patch: Patch) -> dict[str, TensorSpec]:
    """The tensors that a patch expects in a checkpoint."""
    specs = {name: record.base_spec(name) for name, record in patch.records.items()}
    return {name: spec for name, spec in specs.items() if spec is not None}


def names_of(source: Source) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint under all of their names."""
    return {a: source.specs[n] for a, n in source.aliases.items()} | dict(source.specs)


def _tell_renaming(source: Source, entries: Sequence[StackEntry]) -> None:
    """Raises:
    NamesMismatchError: a renaming would let all that a patch expects find its tensor.
    """
    there = names_of(source)
    for entry in entries:
        expected = patch_names(entry.patch)
        if expected.keys() <= there.keys():
            continue
        found = infer(expected, there) if not entry.renames else []
        if entry.renames:  # the user's own renaming, which the norms are still to be added to
            rules = with_norms(expected, there, entry.renames)
            shown = rename(expected, rules, idle=False).values()
            found = [Found(rules, len(expected))] if rules != entry.renames and there.keys() >= {*shown} else []
        if found and found[0].paired == len(expected):
            raise NamesMismatchError(
                f"{entry.patch.label} has other names than {source.label}: all {len(expected)} tensors pair up by a "
                "renaming",
                remedy(found),
            )


def _twin(patch: Patch, name: str, others: Mapping[str | None, list[str]]) -> bool:
    """Whether one of the others is the same tensor of the patch's base, changed in the same way."""
    digest = patch.records[name].base_digest
    folder = name.rpartition("/")[0]  # one part of a model is not tied to another
    alike = [other for other in others.get(digest, ()) if other.rpartition("/")[0] == folder]
    return digest is not None and any(_same_change(patch, name, other) for other in alike)


def _copies(source: Source, touched: Collection[str], exclude: Sequence[str]) -> dict[str, str]:
    """Tied tensors that the checkpoint stores twice where the patch names one: {the other: the one that is named}.

    Embeddings and heads only: matrices outside the numbered layers, of one part of the model. A part whose
    configuration says that its embeddings are not tied has none.
    """
    configs = getattr(source, "configs", {"": getattr(source, "config", {})})
    untied = {part for part, config in configs.items() if config.get("tie_word_embeddings") is False}
    loose = [
        name
        for name, spec in source.specs.items()
        if len(spec.shape) == 2 and not any(w.isdigit() for w in name.split(".")) and _part(name, configs) not in untied
    ]
    copies = Copies(source, [name for name in loose if name in touched])
    others = [name for name in loose if name not in touched and not matches(name, exclude)]
    return {other: name for other in others if (name := copies.of(other)) is not None}


def _part(name: str, parts: Collection[str]) -> str:
    """The part of the model that a tensor is in."""
    folder = name.rpartition("/")[0]
    return folder if folder in parts else ""


def _same_change(patch: Patch, first: str, second: str) -> bool:
    a, b = patch.records[first], patch.records[second]
    return {p: v.digest for p, v in a.parts.items()} == {p: v.digest for p, v in b.parts.items()}


def _add(
    result: Fit, source: Source, stored: str, entry: StackEntry, name: str, misfits: list[str], undefined: list[str]
) -> None:
    patch, record = entry.patch, entry.patch.records[name]
    spec = source.specs.get(stored)
    before = record.base_spec(stored)
    term = Term(patch, name, entry.scale, patch.parts(name))
    if record.added:
        if spec is not None:
            misfits.append(f"{spec}: there already, and {patch.label} adds it")
        elif entry.scale != 1.0:
            undefined.append(f"{stored}: an added tensor holds values, so it goes on at scale 1, not {entry.scale:g}")
        else:
            new = record.spec(stored)
            result.targets.setdefault(stored, Target(new, new, "add", [])).terms.append(term)
        return
    assert before is not None
    if spec is None:
        misfits.append(f"{before}: in {patch.label} and not in the checkpoint")
        return
    if spec.shape != before.shape:
        misfits.append(f"{stored}: shape {list(spec.shape)} in the checkpoint, {list(before.shape)} in {patch.label}")
        return
    opaque = stored in source.opaque
    exact = patch.encoding(name).lossless if record.encoding != "removed" else True
    if (opaque or not before.is_float) and spec.dtype != before.dtype:
        misfits.append(f"{stored}: dtype {spec.dtype} in the checkpoint, {before.dtype} in {patch.label}")
        return
    if opaque and record.encoding != "removed" and not (exact and entry.scale in (0.0, 1.0)):
        undefined.append(f"{spec}: no sums are defined on it, so it takes an exact patch at scale 1 only")
        return
    if record.base_shape is not None and entry.scale != 1.0:
        undefined.append(f"{stored}: its new rows hold values, so the patch goes on at scale 1, not {entry.scale:g}")
        return
    target = result.targets.setdefault(stored, Target(spec, spec, "sum", [], opaque))
    target.terms.append(term)


def _settle(target: Target, undefined: list[str]) -> None:
    """Decides mode and result of a tensor from all its terms."""
    names = ", ".join(t.patch.label for t in target.terms)
    removing = [t for t in target.terms if t.record.encoding == "removed"]
    reshaping = [t for t in target.terms if t.record.base_shape is not None]
    if len(target.terms) > 1 and (target.mode == "add" or removing or reshaping or target.opaque):
        undefined.append(f"{target.spec}: {names}")
        return
    if removing:
        target.mode = "remove"
        return
    alone = target.terms[0]
    if (
        target.mode == "sum"
        and len(target.terms) == 1
        and alone.scale == 1.0
        and alone.patch.encoding(alone.name).lossless
    ):
        target.mode = "restore"
        target.result = alone.record.spec(target.spec.name)
    elif reshaping:
        target.result = TensorSpec(target.spec.name, target.spec.dtype, tuple(alone.record.shape))
