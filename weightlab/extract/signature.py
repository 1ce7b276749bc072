"""Robust Weight Signatures (arXiv 2302.12480): what training against a corruption adds to clean fine-tuning.

With θ0 the pretrained start, θc fine-tuned on clean and θr on corrupted data, a = θc − θ0 and d = θr − θ0:

    RWS = d − (⟨d, a⟩ / ⟨a, a⟩) · a          (a = 0: RWS = d)

on the first K layers. The paper projects tensor by tensor; a fused tensor (query, key and value in one) is another
vector than its parts, so the scope of the projection is a choice, and recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from weightlab.errors import NamesMismatchError, UsageError
from weightlab.extract.diff import DiffOptions, diff_sources
from weightlab.extract.gram import gram, joined
from weightlab.extract.match import aligned
from weightlab.extract.norms import norm_tensors, parse_norm
from weightlab.extract.rules import Rules
from weightlab.files.digest import fingerprint
from weightlab.patches.compute import digest_tensors
from weightlab.patches.header import Method
from weightlab.patches.patch import Patch
from weightlab.sources import Source
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.joined import JoinedSource
from weightlab.sources.virtual.projected import ProjectedSource
from weightlab.sources.virtual.zeros import ZeroSource
from weightlab.stream.executor import Resources
from weightlab.tensors.codes import refusal, require_same_form
from weightlab.tensors.layers import Layer, choose, layers_in
from weightlab.tensors.match import misfit

Scope = Literal["tensor", "layer", "model"]
SCOPES: tuple[Scope, ...] = ("tensor", "layer", "model")


@dataclass(slots=True)
class SignatureOptions:
    """How a signature is taken.

    Attributes:
        project: what one projection is made over: each tensor, each layer, or all chosen tensors together.
        layers: `first:K` and globs over names of layers and tensors; nothing: every layer.
        order: tensor names in the order of the modules; None: natural order of the names.
        units: layers as the user says them, in order (see `layers_in`).
        norm: what becomes of layers with running statistics: `keep` leaves them as the target has them; `robust` moves
            them, at all depths, to the robust model's; `blend:SHARE` part of the way; `recalibrate` likewise, with
            `statistics` for the running ones.
        statistics: the source of running statistics for `recalibrate`.
    """

    project: Scope = "tensor"
    layers: Sequence[str] = ()
    order: Sequence[str] | None = None
    units: Sequence[str] = ()
    norm: str = "keep"
    statistics: Source | None = None

    def __post_init__(self) -> None:
        if self.project not in SCOPES:
            raise UsageError(f"--project {self.project} is not understood", f"choose from {', '.join(SCOPES)}")


def signature_sources(
    pretrained: Source,
    clean: Source,
    robust: Source,
    out: Path | None,
    signature: SignatureOptions,
    options: DiffOptions,
) -> Patch:
    """Takes the signature of `robust` and writes it as a patch that fits `clean` and every model of its shapes.

    Args:
        out: as for `diff_sources`.
        options: encodings and the header; `encode` must be lossy: a signature goes on other models.

    Raises:
        NamesMismatchError: lists the chosen tensors that the three do not share.
        UsageError, MisfitError: layers or modes that make no sense for this model.
        NonFiniteError, RangeError: see `diff_sources`.
    """
    mode, share = parse_norm(signature.norm)
    if Rules(options.encode).any_lossless:
        raise UsageError(
            "a signature goes on other models than its own, which `exact` does not", "encode it dense or quantized:8"
        )
    base_fingerprint = fingerprint(digest_tensors(clean, clean.specs, options.resources))
    clean, robust = aligned(clean, robust)
    clean, pretrained = aligned(clean, pretrained)
    for other in (robust, pretrained):
        require_same_form(clean, other)
    affine, statistics = norm_tensors(clean.specs)
    if mode != "keep" and not statistics:
        raise UsageError(
            f"--norm {mode} is for layers with running statistics, and {clean.label} has none", "leave it out"
        )
    layers = _chosen(clean, (robust, pretrained), {*affine, *statistics}, signature, options.resources)
    weights = [n for layer in layers for n in layer.tensors]
    moved = [] if mode == "keep" else [*affine, *statistics]
    measured = signature.statistics
    if mode == "recalibrate" and measured is None:
        raise UsageError("--norm recalibrate needs data", "give the data to recalibrate on")
    again = [("statistics", measured, statistics)] if mode == "recalibrate" and measured is not None else []
    _require_fit(clean, ("pretrained", pretrained, weights), ("robust", robust, [*weights, *moved]), *again)
    toward, along = DifferenceSource(pretrained, robust, weights), DifferenceSource(pretrained, clean, weights)
    shares = _shares(toward, along, layers, signature.project, options)
    parts: list[Source] = [ProjectedSource(toward, along, shares)]
    parts.append(DifferenceSource(clean, robust, affine if again else moved, factor=share))
    parts += [DifferenceSource(clean, other, names) for _, other, names in again]
    source = JoinedSource(parts, robust.label)
    options.kind, options.base_known = "signature", False
    options.method = Method(
        name="rws",
        parameters={
            "project": signature.project,
            "layers": [layer.name for layer in layers],
            "order": "given" if signature.units else "names" if signature.order is None else "modules",
            "norm": signature.norm,
        },
    )
    options.base_fingerprint = base_fingerprint
    return diff_sources(ZeroSource({n: clean.specs[n] for n in source.specs}), source, out, options)


def _chosen(
    clean: Source, others: Sequence[Source], apart: set[str], signature: SignatureOptions, resources: Resources
) -> list[Layer]:
    """The chosen layers, without what cannot be projected: integers, and codes that are the same in all three.

    Raises:
        MisfitError: lists codes that differ; or no layer that was chosen has a tensor with a difference.
    """
    models = (clean, *others)
    coded = {n for source in models for n in source.codes}
    names = [n for n in clean.specs if n not in apart and (clean.specs[n].is_float or n in coded)]
    layers = choose(layers_in(names, signature.order, signature.units), signature.layers)
    fixed = [n for layer in layers for n in layer.tensors if any(n in source.opaque for source in models)]
    digests = [digest_tensors(s, [n for n in fixed if n in s.specs], resources) for s in models]
    differing = [n for n in fixed if len({found.get(n) for found in digests}) > 1]
    opaque = set(fixed)
    left = [replace(x, tensors=tuple(n for n in x.tensors if n not in opaque)) for x in layers]
    if differing or (fixed and not any(layer.tensors for layer in left)):
        raise refusal(*models, names=differing or fixed)
    return [layer for layer in left if layer.tensors]


def _require_fit(clean: Source, *others: tuple[str, Source, Sequence[str]]) -> None:
    """Checks (role, source, names) against the clean model.

    Raises:
        NamesMismatchError: lists all that is missing or of another shape, of all of them.
    """
    problems = [
        f"{problem} in {other.label} ({role})"
        for role, other, names in others
        for name in names
        if (problem := _misfit(clean, other, name))
    ]
    if problems:
        raise NamesMismatchError(
            f"{len(problems)} tensors do not fit those of {clean.label}",
            "choose layers that all three share, with --layers",
            problems,
        )


def _misfit(clean: Source, other: Source, name: str) -> str:
    if name not in other.specs:
        return f"{clean.specs[name]}: missing"
    return misfit(clean.specs[name], other.specs[name], rows=False)


def _shares(
    toward: Source, along: Source, layers: Sequence[Layer], scope: Scope, options: DiffOptions
) -> dict[str, float]:
    """⟨d, a⟩ / ⟨a, a⟩ of each tensor's group; 0 where a = 0."""
    names = [n for layer in layers for n in layer.tensors]
    products = gram([toward, along], names, options.resources)
    groups = {"tensor": [[n] for n in names], "layer": [list(x.tensors) for x in layers], "model": [names]}[scope]
    shares: dict[str, float] = {}
    for group in groups:
        both = joined(products, group)
        share = float(both[0, 1] / both[1, 1]) if both[1, 1] else 0.0
        shares |= dict.fromkeys(group, share)
    return shares
