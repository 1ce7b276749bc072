"""Which tensors of two checkpoints belong together, tied ones under whichever of their names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from weightlab.errors import NamesMismatchError
from weightlab.patches.ties import Copies
from weightlab.sources import Source
from weightlab.sources.virtual.named import NamedSource
from weightlab.sources.virtual.renamed import RenamedSource
from weightlab.tensors.codes import require_same_form
from weightlab.tensors.match import Pairing, pair
from weightlab.tensors.naming import Renames, infer, remedy, resolve, with_norms
from weightlab.tensors.select import rename, select


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


def renamed(base: Source, tuned: Source, renames: Renames | None) -> tuple[Source, dict[str, str]]:
    """The tuned checkpoint under the base's names, and the renaming that it took.

    LayerNorm's gamma and beta against weight and bias are one parameter to every loader, so that they are always paired
    up, also beside a renaming of the user's own: both spellings in one file are never meant.

    Raises:
        NamesMismatchError, UsageError: see `resolve` and `rename`.
    """
    rules = with_norms(tuned.specs, base.specs, _checked(tuned, resolve(tuned.specs, base.specs, renames)))
    return (RenamedSource(tuned, rules) if rules else tuned), rules


def _checked(source: Source, rules: dict[str, str]) -> dict[str, str]:
    """The rules, of which each must name a tensor, be it only an alias."""
    rename([*source.specs, *source.aliases], rules)
    return rules


def match_sources(
    base: Source,
    tuned: Source,
    allow: Collection[str],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Pairing:
    """Pairs two checkpoints by name; a redundant copy of a tied tensor in only one of them is no difference.

    Args:
        include, exclude: globs; what they leave out is not compared.

    Raises:
        NamesMismatchError: lists every tensor that does not pair up; or, where a renaming would pair them up, says
            which, also if what differs is allowed: a renamed tensor is not one removed and another added.
        MisfitError: weights are in codes in one of them, and plain in the other.
    """
    require_same_form(base, tuned)
    base_specs, tuned_specs = dict(base.specs), dict(tuned.specs)
    for mine, other, specs in ((base, tuned, base_specs), (tuned, base, tuned_specs)):
        copies = Copies(mine, [n for n in mine.specs if n in other.specs])
        for name in [n for n in specs if n not in other.specs]:
            if copies.of(name) is not None:
                del specs[name]
    whole = base_specs, tuned_specs
    if include or exclude:
        chosen = set(select([*base_specs, *(n for n in tuned_specs if n not in base_specs)], include, exclude))
        base_specs = {n: s for n, s in base_specs.items() if n in chosen}
        tuned_specs = {n: s for n, s in tuned_specs.items() if n in chosen}
    added, removed = tuned_specs.keys() - base_specs.keys(), base_specs.keys() - tuned_specs.keys()
    refused = (added and "added" not in allow) or (removed and "removed" not in allow)
    found = infer(whole[1], whole[0]) if refused or (added and removed) else []
    if found:
        gain = found[0].paired - len(whole[0].keys() & whole[1].keys())
        # A new head beside an old one of its shape is a difference that may be meant; half of a model is none.
        enough = min(len(added or removed), len(removed or added)) if refused else min(map(len, whole))
        if 2 * gain >= enough:
            raise NamesMismatchError(
                f"{tuned.label} has other names than {base.label}: {found[0].paired} tensors pair up by a renaming",
                remedy(found),
            )
    return pair(base_specs, tuned_specs, base_label=base.label, tuned_label=tuned.label, allow=allow)
