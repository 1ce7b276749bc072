"""Taking experts apart: what they share, and what each has beyond it (arXiv 2406.15479, section 3).

shared model     θs = θ0 + merged(θ1 − θ0, …, θT − θ0)        by any merge method; task arithmetic with λ = 0.3
exclusive parts  vt = compress(θt − θs)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightlab.errors import UsageError
from weightlab.extract.diff import DiffOptions, diff_sources
from weightlab.extract.rules import Rules
from weightlab.files import disk
from weightlab.files.atomic import atomic_folder, refuse_existing, replace_file
from weightlab.files.digest import fingerprint
from weightlab.methods import METHODS, Deltas, Settings
from weightlab.ops.alike import clean_source
from weightlab.ops.companions import companions, copy_companions, copy_inside
from weightlab.ops.naming import under_names_of
from weightlab.ops.operands import PathLike, model_path
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.header import Method
from weightlab.patches.patched_source import PatchedSource
from weightlab.sources import Source
from weightlab.sources.virtual.chosen import ChosenSource
from weightlab.sources.virtual.computed import ComputedSource
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.zeros import ZeroSource
from weightlab.stream.executor import Resources
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.naming import Renames
from weightlab.twin.experts import expert_source, named, other_integers, shared_tensors
from weightlab.twin.folder import (
    CONFIGURATION,
    EXCLUSIVE,
    EXPERTS,
    HEADER,
    ROUTER,
    SCHEMA,
    SHARED,
    ExpertHeader,
    Twin,
    TwinHeader,
    open_twin,
)

METHOD, LAMBDA = "task_arithmetic", 0.3
"""The paper's: θs = θ0 + 0.29 or 0.3 · Σ (θt − θ0)."""
COMPRESS = "low_rank:16"
_SHORT = {"energy": "low_rank:energy:{}", "random": "sparse:{}:random"}


def twin_split(
    base: PathLike,
    experts: Mapping[str, PathLike] | Sequence[PathLike],
    out: PathLike,
    *,
    method: str = METHOD,
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    compress: str = COMPRESS,
    encode_shared: str = "dense",
    renames: Renames | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    allow_nonfinite: bool = False,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Twin:
    """Splits experts of one base into a shared part and a compressed exclusive part for each.

    Tensors that not all of base and experts have in one shape (classifiers) stay with their expert, whole. Tensors of
    integers stay the base's; the header tells those that experts have otherwise.

    Args:
        experts: {name: checkpoint, patch or PEFT adapter}, or a list of `[NAME=]PATH`, where the last part of the path
            is the name if none is given. Of adapters and patches the product ΔW is what counts, never factors.
        out: a new folder.
        method: how the shared part is made: a name in `weightlab.methods.METHODS`.
        parameters: the method's; by default λ = 0.3 for task arithmetic.
        weights: one for each expert; None: all 1.
        compress: how exclusive parts are stored: `low_rank:R`, `energy:SHARE`, `sparse:SHARE`, `random:SHARE` or any
            lossy encoding. What an encoding is not for, as low rank for vectors, is kept whole.
        encode_shared: how the shared part is stored; lossy only.
        renames: {old: new} from the experts' tensor names to the base's, see `rename`; "auto" infers it for each.

    Raises:
        NamesMismatchError: lists tensors that the base and some experts have, and others lack.
        MisfitError: weights that are codes of a quantised checkpoint.
        UsageError: names that are given twice, and parameters that make no sense.
    """
    refuse_existing(Path(out))
    paths = named(experts)
    merging = METHODS.get(method)
    if method == METHOD:
        parameters = {"lambda": LAMBDA, **(parameters or {})}
    settings = Settings(method, merging.parameters, parameters, len(paths))
    if weights is not None and len(weights) != len(paths):
        raise UsageError(f"{len(weights)} weights for {len(paths)} experts", "give one for each")
    scales = [round_scale(w) for w in weights or [1.0] * len(paths)]
    short, _, amount = compress.partition(":")
    encode = _SHORT[short].format(amount) if short in _SHORT else compress
    if Rules(encode).any_lossless or Rules(encode_shared).any_lossless:
        raise UsageError("parts of a twin are mixed, which `exact` ones cannot be", "store them dense, for example")
    options = DiffOptions(
        encode=encode_shared,
        allow_nonfinite=allow_nonfinite,
        kind="shared",
        base_name=base_name,
        revision=revision,
        license=license,
        base_known=False,
        resources=resources or Resources(),
    )
    with ExitStack() as stack:
        start = clean_source(stack, model_path(base), wait, options.resources)
        tuned = {n: expert_source(stack, base, start, p, wait, options.resources) for n, p in paths.items()}
        mapped, _ = under_names_of(start, list(tuned.values()), renames)
        tuned = dict(zip(tuned, mapped, strict=True))
        common, heads, left_out = shared_tensors(start, tuned, options.resources)
        options.base_fingerprint = fingerprint(digest_tensors(start, start.specs, options.resources))
        deltas, order = _deltas(start, tuned, common, scales, options.resources)
        ordered = settings.ordered(order)
        weighted = [{"id": i, "weight": w} for i, w in zip(deltas.ids, deltas.weights, strict=True)]
        options.method = Method(name=method, parameters={**ordered.record(), "experts": weighted})
        with atomic_folder(Path(out)) as folder:
            merged = ComputedSource(method, deltas.specs, merging.begin(deltas, ordered))
            shared = diff_sources(ZeroSource({n: start.specs[n] for n in common}), merged, folder / SHARED, options)
            chosen = ChosenSource(start, common)
            on = PatchedSource(chosen, fit(chosen, [StackEntry(shared, 1.0)]))
            disk.make_folder(folder / EXPERTS)
            headers = []
            for name, source in tuned.items():
                place = folder / EXPERTS / name
                disk.make_folder(place)
                whole = ChosenSource(source, [*common, *heads[name]])
                patch = diff_sources(on, whole, place / EXCLUSIVE, _exclusive(options, encode, common, heads[name]))
                headers.append(ExpertHeader(name=name, patch=patch.id, heads=heads[name]))
                _copy_configuration(paths[name], place)
            header = TwinHeader(
                schema_version=SCHEMA,
                base={
                    "name": base_name,
                    "revision": revision,
                    "fingerprint": options.base_fingerprint,
                    "path": os.path.relpath(os.path.realpath(base), os.path.realpath(out)),
                },
                method={"name": method, **options.method.parameters},
                compress=encode,
                shared=shared.id,
                result=fingerprint(digest_tensors(on, common, options.resources)),
                experts=headers,
                left_out=left_out,
                kept=other_integers(start, tuned, options.resources),
            )
            if Path(base).is_dir():
                _copy_beside(Path(base), folder)
            replace_file(folder / HEADER, header.model_dump_json(indent=1).encode())
    return open_twin(Path(out))


def _deltas(
    start: Source, tuned: Mapping[str, Source], common: Sequence[str], scales: Sequence[float], resources: Resources
) -> tuple[Deltas, list[int]]:
    """The experts' differences, and in which order they come, which does not depend on that of the experts."""
    sources = [DifferenceSource(start, source, common) for source in tuned.values()]
    ids = [fingerprint(digest_tensors(source, common, resources)) for source in tuned.values()]
    order = sorted(range(len(ids)), key=lambda i: (ids[i], scales[i]))
    specs = {n: max((s.specs[n] for s in sources), key=lambda spec: spec.type.bits) for n in common}
    weights = [scales[i] for i in order]
    return Deltas([sources[i] for i in order], [ids[i] for i in order], weights, specs, resources), order


def _exclusive(options: DiffOptions, encode: str, common: Sequence[str], heads: Sequence[str]) -> DiffOptions:
    """How an exclusive part is taken: from the shared model, whose bytes are known."""
    return replace(
        options,
        encode=encode,
        allow=("added",) if heads else (),
        kind="exclusive",
        method=Method(name="twin", parameters={"compress": encode}),
        base_known=True,
        base_fingerprint=None,
        base_name=None,
        revision=None,
    )


def _copy_beside(base: Path, folder: Path) -> None:
    """Configuration and tokenizer of the base; not what is a twin's, which may lie inside the base's folder."""
    mine = {HEADER, SHARED, EXPERTS, ROUTER}
    copied = [
        name
        for name in companions(base, ())[0]
        if name.parts[0] not in mine and not any((base / above / HEADER).is_file() for above in name.parents)
    ]
    copy_companions(base, copied, folder)


def _copy_configuration(expert: PathLike, place: Path) -> None:
    for name in CONFIGURATION:
        if (Path(expert) / name).is_file():
            copy_inside(Path(expert), Path(name), place)
