"""Without training, and without features: the expert in whose right singular vectors the inputs of its layers lie.

‖Vᵀx‖ decides, as in SMILE (arXiv 2408.10174), there for each layer by itself, here with one mixture for the network.
Experts differ in how much of any input lies in their vectors, so what is usual for each, over all data, is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from weightlab.twin.routers import Examples, Observed


class _Response:
    wants_responses = True

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        responses = examples.observed.responses
        assert responses is not None
        return {"usual": responses.mean(0), "spread": responses.std(0).clamp_min(1e-12)}, {}

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        assert observed.responses is not None
        return functional.softmax((observed.responses - tensors["usual"]) / tensors["spread"], 1)


ROUTER = _Response()
