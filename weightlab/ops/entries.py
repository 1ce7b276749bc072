"""Operands as what goes on a model: patches with their scales, filters and renames."""

from __future__ import annotations

from weightlab.extract.adapter import ALL_OF_IT, AdapterOptions
from weightlab.ops.operands import Base, PatchesLike, adapter_at, label_of, listed, no_base, open_patches
from weightlab.patches.fit import StackEntry, names_of, patch_names
from weightlab.stack.guards import On
from weightlab.tensors.naming import resolve
from weightlab.tensors.select import matches
from weightlab.tensors.spec import TensorSpec


def entries_of(
    patches: PatchesLike, base: Base = no_base, options: AdapterOptions = ALL_OF_IT, *, infer_names: bool = False
) -> list[On]:
    """(what each is recorded as, the entry).

    Filters and renames choose among the tensors of a patch when it is put on. Of an adapter only what they leave
    becomes a patch, under the model's names.

    Args:
        infer_names: whether the renaming of each patch, not of an adapter, is inferred from its names and the model's.

    Raises:
        NamesMismatchError: see `resolve`.
        As `open_patches`.
    """
    operands = listed(patches)
    opened = open_patches(operands, base, options)
    chosen = (options.include, options.exclude, dict(options.renames))
    kept = _beside(base, options.exclude) if any(adapter_at(operand) for operand in operands) else ()
    model: dict[str, TensorSpec] = {}
    if infer_names:
        with base() as (source, _):
            model = {} if source is None else names_of(source)
    found: list[On] = []
    for operand, patch in zip(operands, opened, strict=True):
        filters = chosen
        if adapter_at(operand) is not None:  # what is left: a copy of a tied tensor that would follow
            filters = ((), tuple(e for e in kept if not any(matches(name, [e]) for name in patch.records)), {})
        elif infer_names:
            filters = (options.include, options.exclude, resolve(patch_names(patch), model, "auto"))
        found.append((label_of(operand, patch), StackEntry(patch, patch.exact_scale, *filters)))
    return found


def _beside(base: Base, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns that name something of the model."""
    if not exclude:
        return ()
    with base() as (source, _):
        names = () if source is None else (*source.specs, *source.aliases)
    return tuple(pattern for pattern in exclude if any(matches(name, [pattern]) for name in names))
