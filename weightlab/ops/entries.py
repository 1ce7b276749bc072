"""Operands as what goes on a model: patches with their scales, filters and renames."""

from __future__ import annotations

from weightlab.extract.adapter import ALL_OF_IT, AdapterOptions
from weightlab.ops.operands import Base, PatchesLike, adapter_at, label_of, listed, no_base, open_patches
from weightlab.patches.fit import StackEntry
from weightlab.stack.guards import On


def entries_of(patches: PatchesLike, base: Base = no_base, options: AdapterOptions = ALL_OF_IT) -> list[On]:
    """(what each is recorded as, the entry).

    Filters and renames choose among the tensors of a patch when it is put on. Of an adapter only what they leave
    becomes a patch, under the model's names.

    Raises:
        As `open_patches`.
    """
    operands = listed(patches)
    chosen = (options.include, options.exclude, dict(options.renames))
    return [
        (
            label_of(operand, patch),
            StackEntry(patch, patch.exact_scale, *(chosen if adapter_at(operand) is None else ((), (), {}))),
        )
        for operand, patch in zip(operands, open_patches(operands, base, options), strict=True)
    ]
