"""How sure a router is that was not trained: its scores give an order alone, until a temperature is found for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_POWERS = torch.linspace(-12, 12, 193)
"""Of two; an eighth apart."""


def temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature at which softmax(scores / temperature) has the least cross-entropy.

    Args:
        scores: [samples, T], held out.
        labels: int64 [samples].
    """
    tried = 2.0**_POWERS
    losses = torch.stack([functional.cross_entropy(scores.double() / each, labels) for each in tried])
    return float(tried[losses.argmin()])
