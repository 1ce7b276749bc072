"""Without training: the expert to whose samples' mean the hidden state is nearest.

Near by Mahalanobis' distance, for the covariance around the means that all experts share. With few samples for many
features that is not known well, so it is shrunk toward one variance for all, as far as OAS says (Chen, Wiesel, Eldar
and Hero, 2010, eq. 23). Of the squared distance

    (x − μ)ᵀ Σ⁻¹ (x − μ)

what is the same for all experts is left out, so that T directions and T offsets are all that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weightlab.twin.routers import Examples, Observed
from weightlab.twin.routers._temperature import is_temperature, temperature


class _Nearest:
    wants_responses = False

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        shown = ~examples.held_out
        features, labels = examples.observed.features[shown].double(), examples.labels[shown]
        means = torch.stack([features[labels == expert].mean(0) for expert in range(experts)])
        directions = torch.linalg.solve(_covariance(features - means[labels]), means.T).T
        tensors = {"directions": directions.float(), "offsets": (-(directions * means).sum(1) / 2).float()}
        scores = _scores(tensors, examples.observed.features[examples.held_out])
        return tensors, {"temperature": temperature(scores, examples.labels[examples.held_out])}

    def fits(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], experts: int) -> bool:
        width = tensors["directions"].shape[-1:] if "directions" in tensors else ()
        wanted = {"directions": (experts, *width), "offsets": (experts,)}
        return is_temperature(values) and wanted == {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        return functional.softmax(_scores(tensors, observed.features) / values["temperature"], 1)


def _scores(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Minus half the squared distances, up to what is the same for all experts: [samples, T]."""
    return features @ tensors["directions"].T + tensors["offsets"]


def _covariance(inside: Tensor) -> Tensor:
    """Of samples [n, d] around their means, shrunk toward a multiple of the unit matrix."""
    n, d = inside.shape
    found = inside.T @ inside / n
    trace, squares = found.trace(), found.square().sum()
    shrink = ((1 - 2 / d) * squares + trace**2) / ((n + 1 - 2 / d) * (squares - trace**2 / d)).clamp_min(1e-300)
    share = float(shrink.clamp(0, 1))
    small = max(float(trace) / d, 1e-12)
    return (1 - share) * found + (share + 1e-6) * small * torch.eye(d, dtype=found.dtype)


ROUTER = _Nearest()
