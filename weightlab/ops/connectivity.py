"""Whether a fine-tune will work on another base: a forecast from the weights, before anything is tuned there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from weightlab.errors import NamesMismatchError
from weightlab.extract.gram import Gram, gram, joined
from weightlab.networks.vocabulary import vocabulary_tensors
from weightlab.ops.alike import clean_source, require_shapes, shared_names, under_target_names
from weightlab.ops.operands import ModelLike
from weightlab.ops.three import folder_of_model, row_plan
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.stream.executor import Resources
from weightlab.tensors.layers import unit_of
from weightlab.tensors.naming import Renames
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import patterns

Forecast = Literal["near", "far", "unrelated"]
UNRELATED = 0.5
"""Below this cosine a matrix of two bases shares no training: other seeds, or the same neurons in another order."""
LOST = 0.5
"""Where more than this share of a tune is in such matrices, it will not work."""
PARTLY_LOST = 0.1
"""Where more than this share is, less of it arrives."""
FAR = 0.15
"""Beyond this distance of the bases, in units of the base's length, less than half of a tune may arrive. It lies
between what was measured on one network (MiniLM), where 83 % of a tune still arrived at 0.11 and 44 % at 0.22; on
another one (SmolLM2-135M), up to 0.03, 80 to 99 % did. The ratio to the tune says less: it went up to 16 there."""


@dataclass(frozen=True, slots=True)
class Link:
    """One layer, or all.

    Attributes:
        distance: ‖target − base‖ / ‖base‖.
        change: ‖tuned − base‖ / ‖base‖.
        ratio: ‖target − base‖ / ‖tuned − base‖; None where the tune changed nothing.
        cosine: of base and target.
        along: cosine of target − base and tuned − base.
    """

    layer: str
    distance: float
    change: float
    ratio: float | None
    cosine: float
    along: float


@dataclass(slots=True)
class Connectivity:
    """What is expected of a transfer.

    Attributes:
        whole: over all matrices, where there are any: vectors, such as the weights of norms, are alike in any models.
        layers: likewise, in their order.
        lost: the share of the tune, ‖Δ‖² over matrices, that is in matrices in which the bases are unrelated.
        left_out: embeddings whose rows are numbered otherwise in the target.
    """

    source_base: str
    source_tuned: str
    target_base: str
    forecast: Forecast
    whole: Link
    layers: list[Link]
    lost: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The forecast in a sentence."""
        if self.forecast == "unrelated":
            where = f"where {self.lost:.0%} of the tune is" if self.lost < 0.995 else f"cosine {self.whole.cosine:.2f}"
            return f"the bases are unrelated ({where}): the tune will not work there"
        if self.whole.ratio is None:
            return "the tune changed nothing"
        said = f"the bases differ by {self.whole.distance:.2%} of their length, {self.whole.ratio:.2g} times the tune"
        if self.lost > PARTLY_LOST:
            said += f", and is unrelated where {self.lost:.0%} of the tune is"
        if self.forecast == "far":
            return f"{said}: less of the tune will arrive, and it should be scored"
        return f"{said}: most of the tune should arrive"


def connectivity(
    source_base: ModelLike,
    source_tuned: ModelLike,
    target_base: ModelLike,
    *,
    renames: Renames | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    wait: float = 0.0,
    resources: Resources | None = None,
) -> Connectivity:
    """Forecasts whether target + (tuned − base) works, from the three models alone, streamed.

    arXiv 2503.20110 finds that it does where source and target are connected by a line of low loss, and judges that
    from tuned targets. Before there are any, what tells is how far the target is from the source base, and whether they
    share their training at all.

    Args:
        renames: {old: new} from the target's names to the others', see `rename`; "auto" infers it.
        include, exclude: globs over the target's names; what they leave out is not compared.

    Raises:
        NamesMismatchError: the three are not of one architecture.
    """
    models = (source_base, source_tuned, target_base)
    resources = resources or Resources()
    with ExitStack() as stack:
        base, tuned, target = (clean_source(stack, path, wait, resources) for path in models)
        names = shared_names((base, tuned, target), resources, renames, patterns(include), patterns(exclude))
        folders = [folder_of_model(model) for model in models]
        vocabulary = [n for n in vocabulary_tensors(folders[2], target.specs) if n in names]
        plan = row_plan(folders, (base, tuned, target), {n: names[n] for n in vocabulary}, None)
        left = vocabulary if plan is not None and not plan.plain else []
        require_shapes((base, tuned, target), {n: three for n, three in names.items() if n not in left})
        matrices = [n for n in names if len(target.specs[n].shape) > 1 and n not in left]
        chosen = matrices or [n for n in names if n not in left]
        if not chosen:
            raise NamesMismatchError("no tensor is left to compare", "choose others with --include and --exclude")
        first, second, third = (under_target_names(s, names, i) for i, s in enumerate((base, tuned, target)))
        change, distance = DifferenceSource(first, second, chosen), DifferenceSource(first, third, chosen)
        products = gram([first, change, distance], chosen, resources)
    whole = _link("all", joined(products, chosen))
    layers: dict[str, list[str]] = {}
    for name in sorted(chosen, key=natural_key):
        layers.setdefault(unit_of(name), []).append(name)
    changed = sum(products[name][1, 1] for name in chosen)
    unrelated = sum(products[name][1, 1] for name in chosen if _link(name, products[name]).cosine < UNRELATED)
    lost = float(unrelated / changed) if changed else 0.0
    rows = [_link(layer, joined(products, members)) for layer, members in layers.items()]
    labels = [source.label for source in (base, tuned, target)]
    return Connectivity(labels[0], labels[1], labels[2], forecast_of(whole, lost), whole, rows, lost, left)


def forecast_of(whole: Link, lost: float) -> Forecast:
    """What is expected, from these numbers.

    Args:
        lost: as in `Connectivity`.
    """
    if whole.cosine < UNRELATED or lost > LOST:
        return "unrelated"
    if whole.ratio is None or whole.distance > FAR or lost > PARTLY_LOST:
        return "far"
    return "near"


def _link(layer: str, both: Gram) -> Link:
    """From the inner products of (base, tuned − base, target − base)."""
    base, change, distance = (math.sqrt(both[i, i]) for i in range(3))
    target = math.sqrt(max(0.0, both[0, 0] + 2 * both[0, 2] + both[2, 2]))
    return Link(
        layer,
        distance / base if base else math.inf,
        change / base if base else math.inf,
        distance / change if change else None,
        float(both[0, 0] + both[0, 2]) / (base * target) if base and target else 0.0,
        float(both[1, 2]) / (change * distance) if change and distance else 0.0,
    )
