"""Which tensors of two checkpoints belong together, tied ones under whichever of their names."""

from __future__ import annotations

from collections.abc import Collection

from weightlab.patches.ties import Copies
from weightlab.sources import Source
from weightlab.sources.virtual.named import NamedSource
from weightlab.tensors.codes import require_same_form
from weightlab.tensors.match import Pairing, pair


def aligned(base: Source, tuned: Source) -> tuple[Source, Source]:
    """The two with their tied tensors under names that both have, where there are such.

    A file may store an embedding as `embed` and a state dict know the same tensor as `head` with the alias `embed`.
    """
    base = _shown_as(base, tuned.specs.keys())
    return base, _shown_as(tuned, base.specs.keys())


def _shown_as(source: Source, wanted: Collection[str]) -> Source:
    if not any(alias in wanted for alias in source.aliases):
        return source
    groups: dict[str, list[str]] = {name: [name] for name in source.specs}
    for alias, stored in source.aliases.items():
        groups[stored].append(alias)
    shown = {n: s for s, group in groups.items() for n in ([n for n in group if n in wanted] or [s])}
    return NamedSource(source, shown)


def stored_name(source: Source, name: str) -> str:
    """The name under which an aligned source stores a tensor."""
    return source.stored[name] if isinstance(source, NamedSource) else name


def match_sources(base: Source, tuned: Source, allow: Collection[str]) -> Pairing:
    """Pairs two checkpoints by name; a redundant copy of a tied tensor in only one of them is no difference.

    Raises:
        NamesMismatchError: lists every tensor that does not pair up.
        MisfitError: weights are in codes in one of them, and plain in the other.
    """
    require_same_form(base, tuned)
    base_specs, tuned_specs = dict(base.specs), dict(tuned.specs)
    for mine, other, specs in ((base, tuned, base_specs), (tuned, base, tuned_specs)):
        copies = Copies(mine, [n for n in mine.specs if n in other.specs])
        for name in [n for n in specs if n not in other.specs]:
            if copies.of(name) is not None:
                del specs[name]
    return pair(base_specs, tuned_specs, base_label=base.label, tuned_label=tuned.label, allow=allow)
