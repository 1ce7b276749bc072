"""Without training: the expert to whose samples' mean the hidden state is nearest, in units of the spread around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weightlab.twin.routers import Examples, Observed


class _Nearest:
    wants_responses = False

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        features, labels = examples.observed.features, examples.labels
        means = torch.stack([features[labels == expert].mean(0) for expert in range(experts)])
        inside = features - means[labels]
        return {"means": means, "spread": inside.std(0).clamp_min(1e-6)}, {}

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        means, spread = tensors["means"] / tensors["spread"], tensors["spread"]
        squares = torch.cdist(observed.features / spread, means).square()
        return functional.softmax(-squares / (2 * means.shape[1] ** 0.5), 1)


ROUTER = _Nearest()
