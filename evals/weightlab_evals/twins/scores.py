"""How good a model is at a task: the mean over its answers of how many of those that should get one do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import weightlab as wl
from weightlab_evals.twins.networks import Batch, Part, moved, pooled
from weightlab_evals.twins.texts import CLASSES

CPU = torch.device("cpu")
_BATCH = 64
Told = Callable[[Batch, list[int]], Tensor]
"""Of a batch, and the rows that it has, what is said: [samples, 5]."""


def balanced(said: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share of theirs that is told right; chance is one over their number.

    Args:
        said: [N, 5]; an answer that the task does not know is wrong.
        labels: int64 [N].
    """
    right = said.argmax(1) == labels
    return float(torch.stack([right[labels == label].float().mean() for label in sorted(set(labels.tolist()))]).mean())


def collected(part: Part, told: Told, device: torch.device = CPU) -> Tensor:
    """What is said to all texts of a part, in their order; on the CPU.

    Args:
        device: where batches go.
    """
    rows: list[int] = []
    found: list[Tensor] = []
    with torch.no_grad():
        for chosen, batch in part.batches(_BATCH):
            rows += chosen
            found.append(told(moved(batch, device), chosen).float().cpu())
    said = torch.cat(found)
    return said[torch.tensor(rows).argsort()]


def scored(module: nn.Module, part: Part) -> float:
    """Of a model as it is."""
    network: Any = module
    device = next(module.parameters()).device
    said = collected(part, lambda batch, rows: network.classifier(pooled(network, batch)), device)
    return balanced(said, part.labels)


def choice_scored(modules: Sequence[nn.Module], part: Part, chosen: Tensor) -> float:
    """Of several models, each text by one of them.

    Args:
        chosen: [N], numbers of models.
    """
    networks: Sequence[Any] = modules
    device = networks[0].device

    def told(batch: Batch, rows: list[int]) -> Tensor:
        said = torch.zeros(len(rows), CLASSES, device=device)
        for number in sorted(set(chosen[rows].tolist())):
            mine = (chosen[rows] == number).to(device)
            given = pooled(networks[number], {name: tensor[mine] for name, tensor in batch.items()})
            said[mine] = networks[number].classifier(given)
        return said

    return balanced(collected(part, told, device), part.labels)


def mixture_scored(twin: wl.TwinModel, part: Part, weights: Tensor, expert: int | None) -> dict[str, float]:
    """Of a twin, for a mixture of each text.

    Args:
        weights: [N, T].
        expert: whose task it is.

    Returns:
        the score with the output mixed as all else is, `routed head`; and where there is an expert, with that one's
        own, `true head`. The network below is the same, and runs once.
    """
    said = collected(part, lambda batch, rows: _both_heads(twin, batch, weights[rows], expert), twin.device)
    found = {"routed head": balanced(said[:, 0], part.labels)}
    return found if expert is None else {**found, "true head": balanced(said[:, 1], part.labels)}


def _both_heads(twin: wl.TwinModel, batch: Batch, weights: Tensor, expert: int | None) -> Tensor:
    network: Any = twin.module
    with twin.mixing(weights.to(twin.device)):
        given = pooled(network, batch)
        routed: Tensor = network.classifier(given)
    if expert is None:
        return routed[:, None]
    with twin.mixing(one(expert, len(twin.names)).to(twin.device)):
        return torch.stack([routed, network.classifier(given)], 1)


def one(expert: int, count: int) -> Tensor:
    """[1, T]: that expert alone."""
    return torch.eye(count)[expert : expert + 1]
