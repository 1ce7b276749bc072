"""How sure a router is that was not trained: its scores give an order alone, until a temperature is found for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_POWERS = torch.linspace(-12, 12, 193)
"""Of two; an eighth apart."""


def is_temperature(values: Mapping[str, Any]) -> bool:
    """Whether the values of a router that someone else wrote have one."""
    found = values.get("temperature")
    return isinstance(found, float) and math.isfinite(found) and found > 0


def temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature at which softmax(scores / temperature) has the least cross-entropy.

    Args:
        scores: [samples, T], held out.
        labels: int64 [samples].
    """
    tried = 2.0**_POWERS
    losses = torch.stack([functional.cross_entropy(scores.double() / each, labels) for each in tried])
    return float(tried[losses.argmin()])
