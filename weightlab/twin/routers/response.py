"""Without training, and without features: the expert in whose right singular vectors the inputs of its layers lie.

‖Vᵀx‖ decides, as in SMILE (arXiv 2408.10174), there for each layer by itself, here with one mixture for the network.
Experts differ in how much of any input lies in their vectors, so what is usual for each, over all data, is taken off,
in units of how far that varies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from weightlab.twin.routers import Examples, Observed
from weightlab.twin.routers._temperature import is_temperature, temperature


class _Response:
    wants_responses = True

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        responses = examples.observed.responses
        assert responses is not None
        shown, held_out = responses[~examples.held_out], examples.held_out
        tensors = {"usual": shown.mean(0), "spread": shown.std(0).clamp_min(1e-12)}
        scores = _scores(tensors, responses[held_out])
        return tensors, {"temperature": temperature(scores, examples.labels[held_out])}

    def fits(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], experts: int) -> bool:
        wanted = {"usual": (experts,), "spread": (experts,)}
        return is_temperature(values) and wanted == {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        assert observed.responses is not None
        return functional.softmax(_scores(tensors, observed.responses) / values["temperature"], 1)


def _scores(tensors: Mapping[str, Tensor], responses: Tensor) -> Tensor:
    return (responses - tensors["usual"]) / tensors["spread"]


ROUTER = _Response()
