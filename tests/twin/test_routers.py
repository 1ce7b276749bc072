"""Routers without training, on features and responses that are made up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weightlab.twin.routers import ROUTERS, Examples, Observed
from weightlab.twin.routers._temperature import temperature
from weightlab.twin.routers.nearest import _covariance


def examples(features: Tensor, responses: Tensor | None, labels: Tensor) -> Examples:
    held_out = torch.arange(len(labels)) % 5 == 0
    return Examples(Observed(features, responses), labels, held_out)


def drawn(samples: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes whose means are near one another, in features with one direction in which all vary widely."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    means = 0.5 * torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    wide = torch.randn(1, width, generator=torch.Generator().manual_seed(98))
    noise = (
        0.3 * torch.randn(samples, width, generator=generator) + 8 * torch.randn(samples, 1, generator=generator) * wide
    )
    return means[labels] + noise, labels


def test_nearest_knows_in_which_directions_all_vary() -> None:
    features, labels = drawn(300, 16)
    router = ROUTERS.get("nearest")
    tensors, values = router.fit(examples(features, None, labels), 3, 0)
    others, wanted = drawn(300, 16, seed=5)
    weights = router.weights(tensors, values, Observed(others))
    right = (weights.argmax(1) == wanted).float().mean()
    plain = torch.cdist(others, torch.stack([features[labels == c].mean(0) for c in range(3)])).argmin(1)
    assert right > 0.9 > 0.6 > (plain == wanted).float().mean()
    # As sure as it is right.
    assert abs(float(weights.max(1).values.mean()) - float(right)) < 0.05
    torch.testing.assert_close(weights.sum(1), torch.ones(300))


def test_nearest_is_mahalanobis_distance() -> None:
    features, labels = drawn(4000, 5)
    router = ROUTERS.get("nearest")
    given = examples(features, None, labels)
    tensors, values = router.fit(given, 3, 0)
    shown = ~given.held_out
    means = torch.stack([features[shown & (labels == c)].double().mean(0) for c in range(3)])
    inverse = torch.linalg.inv(_covariance(features[shown].double() - means[labels[shown]]))
    away = features[:50, None].double() - means
    squares = torch.einsum("nci,ij,ncj->nc", away, inverse, away)
    wanted = torch.softmax(-squares / 2 / values["temperature"], 1)
    torch.testing.assert_close(
        router.weights(tensors, values, Observed(features[:50])).double(), wanted, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("samples", [6, 40])
def test_fewer_samples_than_features(samples: int) -> None:
    features, labels = drawn(samples, 64)
    tensors, values = ROUTERS.get("nearest").fit(examples(features, None, labels), 3, 0)
    weights = ROUTERS.get("nearest").weights(tensors, values, Observed(features))
    assert bool(weights.isfinite().all())


def test_features_that_never_vary() -> None:
    features, labels = torch.ones(12, 4), torch.arange(12) % 3
    tensors, values = ROUTERS.get("nearest").fit(examples(features, None, labels), 3, 0)
    weights = ROUTERS.get("nearest").weights(tensors, values, Observed(features))
    torch.testing.assert_close(weights, torch.full((12, 3), 1 / 3))


def test_the_covariance_is_shrunk_the_more_the_fewer_samples_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 3, 8, dtype=torch.float64)
    apart = []
    for samples in (20, 200, 20000):
        inside = torch.randn(samples, 8, generator=generator, dtype=torch.float64) * spread
        apart.append(float((_covariance(inside) - inside.T @ inside / samples).norm()))
    assert apart[0] > apart[1] > apart[2] and apart[2] < 0.01 * float(spread.square().norm())


def test_responses_that_hardly_differ_are_as_sure_as_they_are_right() -> None:
    """An expert answers a thousandth more to its own samples: that says all, if noise is smaller still."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    own = torch.nn.functional.one_hot(labels, 4)
    responses = torch.tensor([0.5, 0.1, 0.3, 0.9]) + 1e-3 * own + 1e-4 * torch.randn(400, 4, generator=generator)
    router = ROUTERS.get("response")
    tensors, values = router.fit(examples(torch.zeros(400, 1), responses, labels), 4, 0)
    weights = router.weights(tensors, values, Observed(torch.zeros(400, 1), responses))
    assert float((weights.argmax(1) == labels).float().mean()) > 0.99
    assert float(weights.max(1).values.mean()) > 0.99


def test_the_temperature_is_that_of_the_scores() -> None:
    """Labels drawn from softmax(scores / 8) give 8 back."""
    generator = torch.Generator().manual_seed(0)
    scores = 20 * torch.randn(20000, 3, generator=generator)
    labels = torch.multinomial(torch.softmax(scores / 8, 1), 1, generator=generator)[:, 0]
    assert math.isclose(temperature(scores, labels), 8, rel_tol=0.1)
