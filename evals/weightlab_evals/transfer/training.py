"""Training of the study's language models: weights in fp32, products in bf16, the rate rises over a few steps.

Without dropout, so that what comes out depends on nothing but the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab_evals.transfer.languages import Language
from weightlab_evals.transfer.texts import Article

_RISE = 5
Watch = Callable[[int, nn.Module], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW without weight decay.

    Attributes:
        rate: the learning rate after the rise.
        falls: from there it falls to 0 at the last step; else it stays.
    """

    rate: float
    steps: int
    batch: int
    falls: bool = False


def tune(
    language: Language,
    module: nn.Module,
    shown: Sequence[Article],
    recipe: Recipe,
    seed: int,
    watch: Watch = lambda step, module: None,
) -> None:
    """Fine-tunes in place on the word after the prompt.

    Args:
        watch: told the number of steps done, from 0 on, and the network.
    """
    optimizer, schedule = _optimizer(module, recipe)
    right = language.topics()
    watch(0, module)
    for step, places in enumerate(_batches(len(shown), recipe, seed), 1):
        batch = [shown[place] for place in places]
        asked = right[torch.tensor([article.topic for article in batch])]
        with mixed():
            loss = functional.nll_loss(language.answers(module, batch), asked)
        _step(loss, optimizer, schedule)
        watch(step, module)


def further(
    language: Language, module: nn.Module, blocks: Tensor, recipe: Recipe, marks: Sequence[float], seed: int
) -> Iterator[float]:
    """Trains in place on plain text; stops at each mark, and at the last for good.

    Args:
        marks: distances from where it begins, in rising order (2-norm over all parameters); without any, all steps
            are done.

    Yields:
        each mark, when the network has come so far.

    Raises:
        RuntimeError: it did not come so far in `recipe.steps` steps.
    """
    begin = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer, schedule = _optimizer(module, recipe)
    left, gone = list(marks), 0.0
    for step, places in enumerate(_batches(len(blocks), recipe, seed), 1):
        with mixed():
            loss = language.text_loss(module, blocks[places], seed * 100_003 + step)
        _step(loss, optimizer, schedule)
        if left:
            gone = sum(float((p.detach() - b).square().sum()) for p, b in zip(module.parameters(), begin, strict=True))
            gone **= 0.5
        while left and gone >= left[0]:
            yield left.pop(0)
        if marks and not left:
            return
    if left:
        raise RuntimeError(f"{recipe.steps} steps came {gone:.3g} far, not {left[0]:.3g}")


def mixed() -> AbstractContextManager[Any]:
    """Products in bf16 where weights are in fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _optimizer(module: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(module.parameters(), recipe.rate, weight_decay=0.0, fused=True)

    def share(step: int) -> float:
        left = 1 - step / recipe.steps if recipe.falls else 1.0
        return min(1.0, (step + 1) / _RISE) * left

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """As many batches as there are steps; all places once before any a second time."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        places, order = order[: recipe.batch], order[recipe.batch :]
        yield places


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    optimizer.zero_grad()
    torch.autograd.backward([loss])
    optimizer.step()
    schedule.step()
