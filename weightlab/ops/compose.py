"""Several patches, each with its scale, as one: added up, or merged by another method."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from weightlab.errors import MisfitError, NamesMismatchError, UsageError
from weightlab.extract.diff import DiffOptions, diff_sources
from weightlab.extract.rules import EncodeRules, Rules
from weightlab.methods import METHODS, Deltas, Settings
from weightlab.ops.operands import ModelLike, PatchesLike, PathLike, base_of, open_patches, reading
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.growth import require_proportion
from weightlab.patches.header import Method
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource, PatchedSource
from weightlab.patches.virtual import delta_patch
from weightlab.sources import Source
from weightlab.sources.virtual.computed import ComputedSource
from weightlab.sources.virtual.zeros import ZeroSource
from weightlab.stream.executor import Resources
from weightlab.tensors.codes import codes_met, refusal
from weightlab.tensors.match import ALLOWANCES
from weightlab.tensors.select import select
from weightlab.tensors.spec import TensorSpec


def compose(
    patches: PatchesLike,
    out: PathLike | None = None,
    *,
    method: str = "task_arithmetic",
    parameters: Mapping[str, Any] | None = None,
    base: ModelLike | None = None,
    encode: EncodeRules = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: str | None = None,
    license: str | None = None,
    notes: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Patch:
    """Σ scale·Δ as one patch, or what another method makes of them. A patch is zero on a tensor that it lacks.

    Args:
        patches: `PATH[@SCALE]` or patches such as `0.5 * patch`; at -1 a patch is negated. To a method the scale is
            the weight.
        method: a name in `weightlab.methods.METHODS`; by default the weighted sum.
        parameters: the method's, by name: a value, or a list with one for each patch, in the order of `patches`.
        base: their base. Exact patches need it, and so does an exact result, which takes the base to
            round(base + Δ). One exact patch at -1, stored exact, is the way back: it goes on the tuned model.
        encode: how tensors are stored. Default: exact when there is a base and every patch is exact, else dense:fp32.

    Raises:
        UsageError: the base is needed and not given; a parameter makes no sense.
        NamesMismatchError: patches disagree on shapes; all are listed.
        MisfitError: tensors that are added, removed, extended or not summable, and no exact result is asked for.
        WrongBaseError: the base is another.
    """
    given = open_patches(patches, base_of(base, key=key, wait=wait, resources=resources))
    if not given:
        raise UsageError("nothing to compose", "give one or more patches")
    merging = METHODS.get(method)
    order = sorted(range(len(given)), key=lambda i: given[i].id)
    opened = [given[i] for i in order]
    settings = Settings(method, merging.parameters, parameters, len(given)).ordered(order)
    twice = [p.label for p, q in itertools.pairwise(opened) if p.id == q.id]
    if twice:
        raise UsageError("a patch is given twice", "give it once, with the sum of its scales", twice)
    resources = resources or Resources()
    for patch in opened:
        patch.verify(resources)
    needing = [p.label for p in opened if any(_exact(p, n) for n in p.records)]
    if not encode:
        encode = "exact" if base is not None and len(needing) == len(opened) else "dense:fp32"
    to_exact = Rules(encode).any_lossless
    if base is None and (needing or to_exact):
        what = (
            "the change of an exact patch is known with its base only" if needing else "an exact result needs the base"
        )
        raise UsageError(what, "give --base", needing)
    options = DiffOptions(
        encode=encode,
        include=include,
        exclude=exclude,
        allow=ALLOWANCES,
        kind="composed",
        method=Method(
            name=method,
            parameters={
                **settings.record(),
                "patches": [{"id": p.id, "scale": p.exact_scale} for p in opened],
            },
        ),
        license=license,
        notes=notes,
        resources=resources,
    )
    place = None if out is None else Path(out)
    plain = method == "task_arithmetic" and settings.plain
    with ExitStack() as stack:
        source = None if base is None else stack.enter_context(reading(base, key=key, wait=wait))
        if plain and to_exact:
            assert source is not None
            return _exact_sum(opened, source, place, options)
        specs = _summable(opened, source, options)
        if plain:
            merged: Source = DeltaSource(opened, source, list(specs))
        else:
            deltas = _deltas(opened, source, specs, resources)
            merged = ComputedSource(method, deltas.specs, merging.begin(deltas, settings))
        if to_exact:
            assert source is not None
            there = {n: source.specs.get(source.aliases.get(n, n), spec) for n, spec in specs.items()}
            virtual = delta_patch(merged, there, there)
            return diff_sources(source, PatchedSource(source, fit(source, [StackEntry(virtual, 1.0)])), place, options)
        options.base_known = False
        bases = {p.header.base.fingerprint for p in opened}
        options.base_fingerprint = bases.pop() if len(bases) == 1 else None
        return diff_sources(ZeroSource(specs), merged, place, options)


def _exact(patch: Patch, name: str) -> bool:
    return patch.records[name].encoding != "removed" and patch.encoding(name).lossless


def _exact_sum(patches: Sequence[Patch], base: Source, out: Path | None, options: DiffOptions) -> Patch:
    back = (
        len(patches) == 1 and patches[0].exact_scale == -1.0 and all(_exact(patches[0], n) for n in patches[0].records)
    )
    entries = [StackEntry(p, 1.0 if back else p.exact_scale) for p in patches]
    fitted = fit(base, entries)
    require_proportion(fitted)
    check_bases(base, fitted.targets.values(), options.resources)
    patched = PatchedSource(base, fitted)
    return diff_sources(patched, base, out, options) if back else diff_sources(base, patched, out, options)


def _deltas(
    patches: Sequence[Patch], base: Source | None, specs: Mapping[str, TensorSpec], resources: Resources
) -> Deltas:
    """The differences as a method wants them."""
    sources = [DeltaSource([p.at(1.0)], base, [n for n in specs if n in p.records]) for p in patches]
    dtypes = {n: "F64" if any(s.specs[n].dtype == "F64" for s in sources if n in s.specs) else "F32" for n in specs}
    computed = {n: TensorSpec(n, dtypes[n], spec.shape) for n, spec in specs.items()}
    return Deltas(sources, [p.id for p in patches], [p.exact_scale for p in patches], computed, resources)


def _summable(patches: Sequence[Patch], base: Source | None, options: DiffOptions) -> dict[str, TensorSpec]:
    """The chosen tensors, as they are before.

    Raises:
        NamesMismatchError, MisfitError, WrongBaseError: see `compose`.
    """
    union = list(dict.fromkeys(name for p in patches for name in p.records))
    names = select(union, options.include, options.exclude)
    options.include = options.exclude = ()
    if base is not None:
        exact = [StackEntry(p, 1.0) for p in patches if any(_exact(p, n) for n in p.records)]
        for entry in exact:
            check_bases(base, fit(base, [entry]).targets.values(), options.resources)
    coded = {} if base is None else codes_met(base, names)
    if base is not None and coded:
        raise refusal(base, names=coded)
    wrong: list[str] = []
    undefined: list[str] = []
    specs: dict[str, TensorSpec] = {}
    for name in names:
        records = {p.label: p.records[name] for p in patches if name in p.records}
        shapes = {label: tuple(r.shape) for label, r in records.items()}
        if len(set(shapes.values())) > 1:
            wrong.append(f"{name}: " + ", ".join(f"{list(s)} in {label}" for label, s in shapes.items()))
        for label, record in records.items():
            what = "removed" if record.encoding == "removed" else "added" if record.added else ""
            what = what or ("extended by rows" if record.base_shape is not None else "")
            what = what or ("without sums" if not record.spec(name).is_float else "")
            if what:
                undefined.append(f"{name}: {what} in {label}")
        before = [s for r in records.values() if (s := r.base_spec(name)) is not None]
        if before:
            specs[name] = max(before, key=lambda s: s.type.bits)
    if wrong:
        raise NamesMismatchError(
            "these patches are for models of different shapes", "leave tensors out with --exclude", wrong
        )
    if undefined:
        raise MisfitError(
            "these tensors have no sum",
            "leave them out with --exclude, or give --base and --encode exact",
            undefined,
        )
    return specs
