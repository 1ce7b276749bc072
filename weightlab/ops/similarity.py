"""How alike changes are: cosines of patches or checkpoints, per layer and overall, and what a patch is most like."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from weightlab.errors import MisfitError, NamesMismatchError, UsageError
from weightlab.extract.adapter import AdapterOptions
from weightlab.extract.gram import Gram, cosine, gram, joined
from weightlab.extract.match import renamed
from weightlab.ops.inspect import has_delta
from weightlab.ops.moments import moments
from weightlab.ops.naming import applies, applying, kept, told, under_patch_names, whole
from weightlab.ops.operands import (
    ModelLike,
    PathLike,
    adapter_at,
    base_of,
    names_patch,
    open_patches,
    parse_patch,
    reading,
)
from weightlab.patches.compute import check_bases
from weightlab.patches.fit import fit
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.renamed import RenamedSource
from weightlab.stream.executor import Resources
from weightlab.tensors.codes import require_same_form
from weightlab.tensors.naming import Renames
from weightlab.tensors.order import layer_of, natural_key
from weightlab.tensors.select import patterns, rename, select


@dataclass(slots=True)
class LayerSimilarity:
    """One layer: ‖·‖ of each operand there, its share of that operand's squared norm, cosines of all pairs."""

    layer: str
    norms: list[float]
    shares: list[float]
    cosines: list[list[float]]


@dataclass(slots=True)
class Comparison:
    """What was found, for operands in the order given.

    Attributes:
        compared: "changes" (patches, or checkpoints less the base) or "weights".
        relative: norms over the base's norm of the same tensors; None without a base.
        tensors: how many tensors any of them has.
    """

    labels: list[str]
    compared: str
    tensors: int
    norms: list[float]
    relative: list[float] | None
    cosines: list[list[float]]
    layers: list[LayerSimilarity]
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Match:
    """One patch of a library: the cosine with what was asked about, and how many tensors both have."""

    label: str
    cosine: float
    shared_tensors: int


def compare(
    operands: Sequence[PathLike | Patch],
    *,
    base: ModelLike | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    key: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Comparison:
    """Cosines and norms of checkpoints or patches, streamed.

    A tensor that one operand lacks counts as zero there; integers and codes of quantised checkpoints are left out.

    Args:
        operands: two or more; patches as `PATH[@SCALE]`.
        base: what checkpoints are compared as changes of; exact patches need it. Without one checkpoints are compared
            as they are.
        include, exclude: globs over tensor names; what they leave out is not compared, whatever its shape.
        renames: {old: new} from the operands' tensor names to those of the base, or without one of the first operand,
            see `rename`; "auto" infers it for each.

    Raises:
        UsageError: fewer than two, or patches beside checkpoints without a base.
        NamesMismatchError: lists the tensors whose shapes differ.
        MisfitError: there is nothing but integers and codes.
    """
    if len(operands) < 2:
        raise UsageError("there is nothing to compare with", "give two or more")
    resources = resources or Resources()
    chosen = Chosen(patterns(include), patterns(exclude), renames)
    with _vectors(operands, base, key, wait, resources, chosen) as (sources, source, kind):
        names = _summable(sources, chosen)
        if not names:
            raise MisfitError(
                "there is no tensor to compare: nothing is changed, or all are integers and codes, which have no sums",
                "compare them bit for bit with `weightlab diff A B`",
            )
        products = gram(sources, names, resources)
        weights = 0.0 if source is None else _norm(source, names, resources)
    count = len(sources)
    whole = joined(products, names)
    norms = [math.sqrt(whole[i, i]) for i in range(count)]
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return Comparison(
        [_label(operand) for operand in operands],
        kind,
        len(names),
        norms,
        [norm / weights for norm in norms] if weights else None,
        _cosines(whole),
        [_layer(layer, joined(products, group), whole) for layer, group in layers.items()],
        [*_lacking(operands, sources, names), *told(chosen.taken if renames == "auto" else {})],
    )


def identify(
    patch: PathLike | Patch,
    library: Sequence[PathLike | Patch],
    *,
    base: ModelLike | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> list[Match]:
    """What a patch is most like: the patches of a library by their cosine with it, the most alike first.

    Args:
        library: patches, or folders of patch files.
        base: the base of exact patches.
        include, exclude: globs over tensor names; what they leave out is not compared.

    Raises:
        UsageError: the library is empty, or is a checkpoint.
        NamesMismatchError: lists the tensors whose shapes differ.
    """
    resources = resources or Resources()
    found = [entry for given in library for entry in patches_in(given)]
    if not found:
        raise UsageError("the library holds no patch", "give patches, or a folder of them")
    matches: list[Match] = []
    for entry in found:
        chosen = Chosen(patterns(include), patterns(exclude))
        with _vectors([patch, entry], base, key, wait, resources, chosen) as (sources, _, kind):
            if kind != "changes":
                raise UsageError("checkpoints are not identified", "give patches")
            names = _summable(sources, chosen)
            products = gram(sources, names, resources)
            alike = cosine(joined(products, names), 0, 1) if names else 0.0
            shared = sum(all(n in s.specs for s in sources) for n in names)
        matches.append(Match(_label(entry), alike, shared))
    return sorted(matches, key=lambda m: (-m.cosine, m.label))


def patches_in(given: PathLike | Patch) -> list[PathLike | Patch]:
    """A patch, or the patches in a folder of them, by name."""
    if isinstance(given, Patch):
        return [given]
    path = Path(parse_patch(os.fspath(given))[0])
    if path.is_dir() and not names_patch(path):
        return [p for p in sorted(path.iterdir()) if names_patch(p)]
    return [given]


@dataclass(slots=True)
class Chosen:
    """What of the operands is compared.

    Attributes:
        taken: the renaming that was taken.
        seen: every name that a filter may mean.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    renames: Renames | None = None
    taken: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def kept(self, names: Iterable[str]) -> list[str]:
        names = list(names)
        self.seen.update(names)
        return [name for name in names if kept(name, self.include, self.exclude)]


@contextmanager
def _vectors(
    operands: Sequence[PathLike | Patch],
    base: ModelLike | None,
    key: str | None,
    wait: float,
    resources: Resources,
    chosen: Chosen,
) -> Iterator[tuple[list[Source], Source | None, str]]:
    """(each operand as a source of float tensors, the base, what these are)."""
    with ExitStack() as stack:
        source = None if base is None else stack.enter_context(reading(base, key=key, wait=wait))
        opening = base_of(base, key=key, wait=wait, resources=resources)
        adapting = AdapterOptions(renames=chosen.renames or {})
        patches = {i: open_patches(o, opening, adapting)[0] for i, o in enumerate(operands) if names_patch(o)}
        if source is None and patches and len(patches) < len(operands):
            raise UsageError("patches and checkpoints are compared as changes of one base", "give --base")
        given: list[Patch | Source] = []
        for index, operand in enumerate(operands):
            if index in patches:
                given.append(patches[index])
                continue
            assert not isinstance(operand, Patch)
            given.append(stack.enter_context(reading(operand, key=key, wait=wait)))
        names = [g.records if isinstance(g, Patch) else {**g.specs, **g.aliases} for g in given]
        # Under the wanted names already: without a base the first operand, and adapters that were opened with one.
        ready = [i == 0 if source is None else adapter_at(o) is not None for i, o in enumerate(operands)]
        open_ones = [{} if done else mine for done, mine in zip(ready, names, strict=True)]
        rules = applying(open_ones, None if all(ready) else chosen.renames)
        found: list[Source] = []
        checkpoints: list[Source] = [] if source is None else [source]
        for one, done, mine in zip(given, ready, rules, strict=True):
            if isinstance(one, Patch):
                wanted = source or (found[0] if found else None)
                found.append(_delta(one, source, wanted, {} if done else mine, resources, chosen))
                continue
            for other in checkpoints:
                require_same_form(other, one)
            checkpoints.append(one)
            first = source or (found[0] if found else None)
            opened, taken = (one, {}) if first is None else renamed(first, one, mine)
            chosen.taken |= taken
            plain = chosen.kept(n for n, s in opened.specs.items() if s.is_float and n not in opened.opaque)
            found.append(opened if source is None else _change(source, opened, plain))
        yield found, source, "changes" if patches or source is not None else "weights"


def _label(operand: PathLike | Patch) -> str:
    return operand.label if isinstance(operand, Patch) else os.fspath(operand)


def _delta(
    patch: Patch, base: Source | None, wanted: Source | None, renames: Renames, resources: Resources, chosen: Chosen
) -> Source:
    """A patch's change, under the names of the base or of the first operand, which are `wanted`."""
    view, rules = (None, {}) if wanted is None else under_patch_names(wanted, patch, renames)
    view = None if base is None else view
    chosen.taken |= rules
    shown = rename(patch.records, rules, idle=False)
    left = {*chosen.kept(shown.values())}
    entry = whole(patch, rules, chosen.include, chosen.exclude)
    if base is not None and entry is not None:
        check_bases(base, fit(base, [entry]).targets.values(), resources)
    names = [n for n in patch.records if shown[n] in left and has_delta(patch, n, view)]
    hidden = [
        n
        for n, r in patch.records.items()
        if shown[n] in left and n not in names and r.spec(n).is_float and r.encoding == "exact"
    ]
    if hidden and base is None:
        raise UsageError(f"{patch.label}: the change of an exact patch is known with its base only", "give --base")
    delta = DeltaSource([patch], view, names)
    mine = {old: new for old, new in rules.items() if applies(old, names)}
    return RenamedSource(delta, mine) if mine else delta


def _change(base: Source, tuned: Source, names: Sequence[str]) -> Source:
    shared = [n for n in names if n in base.specs and base.specs[n].is_float and n not in base.opaque]
    wrong = [
        f"{n}: {list(base.specs[n].shape)} in {base.label}, {list(tuned.specs[n].shape)} in {tuned.label}"
        for n in shared
        if base.specs[n].shape != tuned.specs[n].shape
    ]
    missing = [f"{n}: not in {base.label}" for n in names if n not in base.specs]
    if wrong or missing:
        raise NamesMismatchError(
            f"{tuned.label} does not fit {base.label}", "leave tensors out with --exclude", [*wrong, *missing]
        )
    return DifferenceSource(base, tuned, shared)


def _summable(sources: Sequence[Source], chosen: Chosen) -> list[str]:
    """The chosen float tensors that any of them has.

    Raises:
        NamesMismatchError: lists those of which shapes differ.
        UsageError: a pattern matches nothing.
    """
    names = chosen.kept(sorted({n for s in sources for n in s.specs}, key=natural_key))
    select(chosen.seen, chosen.include, chosen.exclude)
    wrong = []
    for name in names:
        shapes = {s.label: s.specs[name].shape for s in sources if name in s.specs}
        if len(set(shapes.values())) > 1:
            wrong.append(f"{name}: " + ", ".join(f"{list(shape)} in {label}" for label, shape in shapes.items()))
    if wrong:
        raise NamesMismatchError("these are of different shapes", "leave tensors out with --exclude", wrong)
    return [n for n in names if all(s.specs[n].is_float and n not in s.opaque for s in sources if n in s.specs)]


def _norm(base: Source, names: Sequence[str], resources: Resources) -> float:
    stored = sorted({base.aliases.get(n, n) for n in names} & base.specs.keys())
    return math.hypot(*(m.norm for m in moments(base, stored, resources).values()))


def _cosines(products: Gram) -> list[list[float]]:
    return [[cosine(products, i, j) for j in range(len(products))] for i in range(len(products))]


def _layer(layer: str, products: Gram, whole: Gram) -> LayerSimilarity:
    squares = [(float(products[i, i]), float(whole[i, i])) for i in range(len(products))]
    return LayerSimilarity(
        layer,
        [math.sqrt(own) for own, _ in squares],
        [own / all_ if all_ else 0.0 for own, all_ in squares],
        _cosines(products),
    )


def _lacking(operands: Sequence[PathLike | Patch], sources: Sequence[Source], names: Sequence[str]) -> list[str]:
    """A line for each operand that lacks tensors."""
    counts = [sum(n not in s.specs for n in names) for s in sources]
    return [
        f"{_label(operand)} lacks {count} of {len(names)} tensors: zero there"
        for operand, count in zip(operands, counts, strict=True)
        if count
    ]
