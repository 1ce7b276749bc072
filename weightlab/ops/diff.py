"""Taking the difference of two models as a patch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from weightlab.extract.diff import DiffOptions, diff_sources
from weightlab.extract.match import renamed
from weightlab.extract.rules import EncodeRules
from weightlab.ops.operands import ModelLike, PathLike, adapters_beside, reading
from weightlab.patches.patch import Patch
from weightlab.sources import Source, cautions_of
from weightlab.stream.executor import Resources
from weightlab.tensors import naming
from weightlab.tensors.naming import Renames


def diff(
    base: ModelLike,
    tuned: ModelLike,
    out: PathLike | None = None,
    *,
    encode: EncodeRules = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    allow: Collection[str] = (),
    allow_nonfinite: bool = False,
    key: str | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    notes: str | None = None,
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Patch:
    """Takes `tuned` − `base`, tensor by tensor.

    Args:
        base, tuned: paths or state dicts.
        out: `NAME.safetensors` for one file, any other name for a folder; None: temporary storage that lasts as long as
            the patch object.
        encode: how tensors are stored; see `weightlab.extract.rules.Rules`. Default: exact.
        include, exclude: globs over the base's tensor names.
        renames: {old: new} from the tuned model's tensor names to the base's, see `rename`; "auto" infers it.
        allow: differences in structure that are meant: "added" and "removed" tensors, appended "rows".
        key: where in pickles the state dict lies.
        base_name, revision: the base's name on the Hub and its revision, for the header.

    Raises:
        NamesMismatchError: lists every tensor that does not pair up; nothing was written.
        NonFiniteError: lists the tensors with NaN or infinity, unless `allow_nonfinite`.
        RangeError: lists the tensors whose change is too large for how it is to be stored.
    """
    options = DiffOptions(
        encode=encode,
        include=include,
        exclude=exclude,
        allow=allow,
        allow_nonfinite=allow_nonfinite,
        base_name=base_name,
        revision=revision,
        license=license,
        notes=notes,
        resources=resources or Resources(),
    )
    with ExitStack() as stack:
        before: Source = stack.enter_context(reading(base, key=key, wait=wait))
        after: Source = stack.enter_context(reading(tuned, key=key, wait=wait))
        cautions = [*cautions_of(before), *cautions_of(after), *adapters_beside(base, tuned)]
        options.notes = "; ".join([*([options.notes] if options.notes else []), *cautions]) or None
        after, taken = renamed(before, after, renames)
        if taken and taken != renames:
            cautions.append(f"names of the tuned model were mapped: {naming.options(taken)}")
            options.notes = "; ".join(n for n in (notes, *cautions) if n)
        return diff_sources(before, after, None if out is None else Path(out), options)
