"""Operands as what goes on a model: patches with their scales, filters and renames."""

from __future__ import annotations

from weightlab.extract.adapter import ALL_OF_IT, AdapterOptions
from weightlab.ops.operands import Base, PatchesLike, adapter_at, label_of, listed, no_base, open_patches
from weightlab.patches.fit import StackEntry, names_of, patch_names
from weightlab.stack.guards import On
from weightlab.tensors.naming import resolve
from weightlab.tensors.select import matches
from weightlab.tensors.spec import TensorSpec


def entries_of(patches: PatchesLike, base: Base = no_base, options: AdapterOptions = ALL_OF_IT) -> list[On]:
    """(what each is recorded as, the entry).

    Filters and renames choose among the tensors of a patch when it is put on. Of an adapter only what they leave
    becomes a patch, under the model's names. Renames that are to be inferred are, for each by itself.

    Raises:
        NamesMismatchError: see `resolve`.
        As `open_patches`.
    """
    operands = listed(patches)
    opened = open_patches(operands, base, options)
    adapters = [adapter_at(operand) is not None for operand in operands]
    kept = _beside(base, options.exclude) if any(adapters) else ()
    model: dict[str, TensorSpec] = {}
    if options.renames == "auto" and not all(adapters):
        with base() as (source, _):
            model = {} if source is None else names_of(source)
    found: list[On] = []
    for operand, patch, adapter in zip(operands, opened, adapters, strict=True):
        if adapter:  # what is left: a copy of a tied tensor that would follow
            left = tuple(e for e in kept if not any(matches(name, [e]) for name in patch.records))
            entry = StackEntry(patch, patch.exact_scale, (), left)
        else:
            rules = options.renames
            if rules == "auto":
                names = patch_names(patch)
                rules = resolve(names, model, "auto") if names.keys() - model.keys() else {}
            entry = StackEntry(patch, patch.exact_scale, options.include, options.exclude, dict(rules))
        found.append((label_of(operand, patch), entry))
    return found


def _beside(base: Base, exclude: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns that name something of the model."""
    if not exclude:
        return ()
    with base() as (source, _):
        names = () if source is None else (*source.specs, *source.aliases)
    return tuple(pattern for pattern in exclude if any(matches(name, [pattern]) for name in names))
