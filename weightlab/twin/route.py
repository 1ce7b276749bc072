"""Making a router for a twin, and how well it routes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlab.errors import MisfitError, UsageError
from weightlab.twin.model import TwinModel
from weightlab.twin.routers import ROUTERS, Examples, Observed
from weightlab.twin.routing import Router, router_for

Batch = Mapping[str, Tensor]
"""What the module's forward takes by name, each with one row for each sample."""
_BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Samples for which the largest weight lies from `low` to `high`.

    Attributes:
        weight: what it is on average.
        right: the share of them that goes to the right expert.
    """

    low: float
    high: float
    samples: int
    weight: float
    right: float


@dataclass(frozen=True, slots=True)
class Routed:
    """What came of it, on samples that were held out.

    Attributes:
        accuracy: the share of samples whose largest weight is the right expert's.
        by_expert: the same for each expert's samples.
        calibration: how sure it is, and how often right then.
    """

    router: Router
    samples: int
    held_out: int
    accuracy: float
    by_expert: dict[str, float]
    calibration: list[Bin]


def route(
    model: TwinModel,
    data: Mapping[str, Iterable[Batch]],
    *,
    kind: str = "trained",
    held_out: float = 0.2,
    seed: int = 0,
) -> Routed:
    """Makes a router from samples of which it is known whose they are. The model has it afterwards; nothing is written.

    Args:
        data: {expert: batches of its training data}, all experts.
        kind: a name in `weightlab.twin.routers.ROUTERS`.
        held_out: the share of each expert's samples that is not trained on: a checkpoint is chosen by them, and they
            are what accuracy and calibration are measured on. Never give data that the twin will be tested on.
        seed: of the choice, and of training.

    Raises:
        UsageError: experts without data, or data of others; all are listed.
        MisfitError: hidden states that are not finite.
    """
    wrong = [f"{name}: no data" for name in model.names if name not in data]
    wrong += [f"{name}: no such expert" for name in data if name not in model.names]
    if wrong:
        raise UsageError("the data is not that of the experts", f"give data for {', '.join(model.names)}", wrong)
    if not 0 < held_out < 1:
        raise UsageError(f"held_out={held_out:g} makes no sense", "give a share between 0 and 1")
    router = ROUTERS.get(kind)
    observed, labels = [], []
    for number, name in enumerate(model.names):
        for batch in data[name]:
            observed.append(model.observe(responses=router.wants_responses, **batch))
            labels += [number] * len(observed[-1].features)
    every, answers = _joined(observed), torch.tensor(labels)
    counts = torch.bincount(answers, minlength=len(model.names))
    few = [f"{name}: {int(count)}" for name, count in zip(model.names, counts, strict=True) if count < 4]
    if few:
        raise UsageError("too few samples", "give four or more for each expert", few)
    _require_finite(every, answers, model.names)
    apart = _apart(answers, held_out, seed)
    tensors, values = router.fit(Examples(every, answers, apart), len(model.names), seed)
    found = router_for(model.twin, kind, tensors, values)
    weights = found.weights(_rows(every, apart))
    model.router = found
    return _report(found, model.names, weights, answers[apart], len(answers))


def _joined(observed: list[Observed]) -> Observed:
    features = torch.cat([each.features.cpu() for each in observed])
    responses = [each.responses.cpu() for each in observed if each.responses is not None]
    return Observed(features, torch.cat(responses) if responses else None)


def _require_finite(observed: Observed, labels: Tensor, names: list[str]) -> None:
    """Raises:
    MisfitError: lists whose samples have hidden states that are not finite.
    """
    bad = ~observed.features.isfinite().all(1)
    if bool(bad.any()):
        counts = [f"{name}: {int(bad[labels == number].sum())}" for number, name in enumerate(names)]
        raise MisfitError("hidden states of samples are not finite", "check the model, and its dtype", counts)


def _rows(observed: Observed, which: Tensor) -> Observed:
    return Observed(observed.features[which], None if observed.responses is None else observed.responses[which])


def _apart(labels: Tensor, share: float, seed: int) -> Tensor:
    """bool [samples]: those that are held out, the same share of each expert's."""
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(len(labels), dtype=torch.bool)
    for number in range(int(labels.max()) + 1):
        rows = torch.nonzero(labels == number)[:, 0]
        count = min(len(rows) - 2, max(1, round(share * len(rows))))
        apart[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return apart


def _report(router: Router, names: list[str], weights: Tensor, labels: Tensor, samples: int) -> Routed:
    sure, said = weights.max(1)
    right = said == labels
    by_expert = {name: float(right[labels == number].float().mean()) for number, name in enumerate(names)}
    bins = []
    for number in range(_BINS):
        low, high = number / _BINS, (number + 1) / _BINS
        inside = (sure > low) & (sure <= high)
        if bool(inside.any()):
            mean, share = float(sure[inside].mean()), float(right[inside].float().mean())
            bins.append(Bin(low, high, int(inside.sum()), mean, share))
    accuracy: Any = right.float().mean()
    return Routed(router, samples, len(labels), float(accuracy), by_expert, bins)
