"""The layers of a network, in order, and choosing some of them.

A layer is what a network repeats: a numbered block, or what stands alone. Names decide which tensors go together;
their order is that of the modules where it is known, and otherwise the natural order of the names. What lies in folders
below the model's own (`2_Dense/linear`) comes after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightlab.errors import UsageError
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import matches

_STAGES = frozenset(("stages", "layers"))  # `layers.0.blocks.1` is a block of a stage; `block.0.layer.1` half a block
_BLOCKS = frozenset(("layers", "blocks"))
_STEM = "stem"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. `counted`: `first:K` counts it; a head or final norm beside numbered blocks goes by name only."""

    name: str
    tensors: tuple[str, ...]
    counted: bool = True


def unit_of(name: str) -> str:
    """The layer that a tensor's name speaks of: up to and with its first number; a stage's blocks count one by one.

    >>> unit_of("encoder.layer.3.output.dense.weight"), unit_of("encoder.stages.1.layers.0.conv.weight")
    ('encoder.layer.3', 'encoder.stages.1.layers.0')
    >>> unit_of("classifier.weight")
    'classifier'
    """
    words = name.split(".")[:-1] or [name]
    for index, word in enumerate(words):
        if word.isdigit():
            inner = words[index + 1 : index + 3]
            staged = words[index - 1] in _STAGES and len(inner) == 2 and inner[0] in _BLOCKS and inner[1].isdigit()
            return ".".join(words[: index + (3 if staged else 1)])
    return ".".join(words)


def layers_in(names: Collection[str], order: Sequence[str] | None = None, units: Sequence[str] = ()) -> list[Layer]:
    """The layers that tensors belong to, in order.

    Args:
        names: all tensors.
        order: tensor names in the order of the modules; names that it lacks come last. None: natural order.
        units: layers as the user says them, in order: each has the tensors whose names begin with it (and a dot).

    With a known order, what stands before the first numbered block (embeddings, a stem) is one layer, the first.

    Raises:
        UsageError: a unit that no tensor belongs to.
    """
    if units:
        return _as_said(names, units)
    places = {name: index for index, name in enumerate(order or ())}
    ordered = sorted(names, key=lambda n: (places.get(n, len(places)), "/" in n, natural_key(n)))
    groups: dict[str, list[str]] = {}
    for name in ordered:
        groups.setdefault(unit_of(name), []).append(name)
    numbered = [unit for unit in groups if _is_numbered(unit)]
    if not numbered:
        return [Layer(unit, tuple(tensors)) for unit, tensors in groups.items()]
    found: list[Layer] = []
    if order is not None:
        before = list(groups)[: list(groups).index(numbered[0])]
        if before:
            found.append(Layer(_STEM, tuple(n for unit in before for n in groups.pop(unit))))
    return found + [Layer(unit, tuple(tensors), _is_numbered(unit)) for unit, tensors in groups.items()]


def _is_numbered(unit: str) -> bool:
    return unit.rpartition(".")[2].isdigit()


def _as_said(names: Collection[str], units: Sequence[str]) -> list[Layer]:
    groups: dict[str, list[str]] = {unit: [] for unit in units}
    for name in sorted(names, key=natural_key):
        owner = max((u for u in units if name == u or name.startswith(f"{u}.")), key=len, default=None)
        if owner is not None:
            groups[owner].append(name)
    idle = [unit for unit, tensors in groups.items() if not tensors]
    if idle:
        raise UsageError("these layers have no tensor", "give the beginnings of tensor names", idle)
    return [Layer(unit, tuple(tensors)) for unit, tensors in groups.items()]


def choose(layers: Sequence[Layer], wanted: Iterable[str]) -> list[Layer]:
    """The layers, or parts of them, that are asked for, in their own order; all of them when nothing is asked for.

    Args:
        wanted: `first:K`; or globs over names of layers and of tensors.

    Raises:
        UsageError: lists what fits nothing.
    """
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if not wanted:
        return list(layers)
    chosen: dict[str, None] = {}
    idle: list[str] = []
    for word in wanted:
        kind, sign, count = word.partition(":")
        if sign and kind == "first":
            found = _first(layers, count)
        else:
            found = [n for layer in layers for n in layer.tensors if matches(layer.name, [word]) or matches(n, [word])]
        if not found:
            idle.append(word)
        chosen.update(dict.fromkeys(found))
    if idle:
        raise UsageError("these fit no layer", f"the layers are: {', '.join(layer.name for layer in layers)}", idle)
    parts = [Layer(x.name, tuple(n for n in x.tensors if n in chosen), x.counted) for x in layers]
    return [layer for layer in parts if layer.tensors]


def _first(layers: Sequence[Layer], count: str) -> list[str]:
    counted = [layer for layer in layers if layer.counted]
    if not count.isdecimal() or not 1 <= int(count) <= len(counted):
        raise UsageError(
            f"first:{count}: there are {len(counted)} layers to count", f"give a number from 1 to {len(counted)}"
        )
    return [name for layer in counted[: int(count)] for name in layer.tensors]


def layer_names(layers: Iterable[Layer]) -> Mapping[str, str]:
    """{tensor: layer}."""
    return {name: layer.name for layer in layers for name in layer.tensors}
