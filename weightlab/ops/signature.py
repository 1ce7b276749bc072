"""Taking a Robust Weight Signature as a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from weightlab.extract.options import DiffOptions
from weightlab.extract.rules import EncodeRules
from weightlab.extract.signature import Scope, SignatureOptions, signature_sources
from weightlab.ops.naming import told, under_names_of
from weightlab.ops.operands import ModelLike, PathLike, reading
from weightlab.patches.patch import Patch
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources
from weightlab.tensors.naming import Renames


def signature(
    pretrained: ModelLike,
    clean: ModelLike,
    robust: ModelLike,
    out: PathLike | None = None,
    *,
    project: Scope = "tensor",
    layers: Sequence[str] | str = (),
    order: Sequence[str] | None = None,
    units: Sequence[str] = (),
    norm: str = "keep",
    statistics: Mapping[str, Tensor] | None = None,
    encode: EncodeRules = "dense",
    renames: Renames | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    notes: str | None = None,
    allow_nonfinite: bool = False,
    key: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Patch:
    """The signature of `robust`: what training against a corruption added to clean fine-tuning (arXiv 2302.12480).

    RWS = d − (⟨d, a⟩ / ⟨a, a⟩)·a with a = clean − pretrained and d = robust − pretrained. The patch fits `clean`, and
    every model whose chosen tensors have the same names and shapes. Its scale α is linear, also of several at a time.

    Args:
        pretrained, clean, robust: paths or state dicts.
        out: as for `diff`.
        project: what one projection is made over: "tensor", "layer" or "model".
        layers: `first:K`, or globs over names of layers and tensors; nothing: every layer.
        order: all tensor names in the order of the modules (`weightlab.file_order` gives it); None: natural order.
        units: layers by the beginnings of their tensors' names, in order, where names do not tell them.
        norm: layers with running statistics: "keep", "robust", "blend:SHARE" or "recalibrate".
        statistics: {name: tensor} of running statistics, for "recalibrate" (`weightlab.recalibrate` makes them).
        encode: how tensors are stored; lossy only.
        renames: {old: new} from the other two's tensor names to those of `clean`, see `rename`; "auto" infers it.

    Raises:
        UsageError, MisfitError, NamesMismatchError: see `weightlab.extract.signature`; nothing was written.
        NonFiniteError, RangeError: see `diff`.
    """
    options = DiffOptions(
        encode=encode,
        allow_nonfinite=allow_nonfinite,
        base_name=base_name,
        revision=revision,
        license=license,
        notes=notes,
        resources=resources or Resources(),
    )
    chosen = SignatureOptions(
        project,
        (layers,) if isinstance(layers, str) else tuple(layers),
        order,
        tuple(units),
        norm,
        None if statistics is None else MemorySource(statistics, "the statistics"),
    )
    with ExitStack() as stack:
        start, usual, trained = (
            stack.enter_context(reading(m, key=key, wait=wait)) for m in (pretrained, clean, robust)
        )
        (start, trained), taken = under_names_of(usual, [start, trained], renames)
        options.notes = "; ".join([*([notes] if notes else []), *told(taken if renames == "auto" else {})]) or None
        return signature_sources(start, usual, trained, None if out is None else Path(out), chosen, options)
