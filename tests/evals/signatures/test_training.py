"""Training and scoring of the study's networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from weightlab_evals.networks import vgg
from weightlab_evals.signatures.data import Part
from weightlab_evals.signatures.training import Recipe, accuracy, augmented, train


def images(count: int = 64) -> Part:
    """Half are dark, class 0; half are bright, class 1."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return Part((noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels)


class _Bright(nn.Module):
    """Tells bright from dark without being trained."""

    def forward(self, shown: Tensor) -> Tensor:
        bright = shown.mean((1, 2, 3)) - 0.4
        return torch.stack([-bright, bright], 1)


def test_accuracy_is_the_share_of_right_ones() -> None:
    shown = images(300)  # more than one batch, and a rest
    assert accuracy(_Bright(), shown) == 1.0
    wrong = shown.labels.clone()
    wrong[:75] = 1 - wrong[:75]
    assert accuracy(_Bright(), Part(shown.images, wrong)) == 0.75


def test_the_same_seed_gives_the_same_weights_and_it_learns() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        network = vgg()
        train(network, images(), Recipe(15, 3e-3), seed)
        assert not network.training
        found.append(network.state_dict())
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    assert any(not torch.equal(t, found[2][n]) for n, t in found[0].items())
    assert accuracy(network, images()) > 0.95


def test_augmented_images_are_moved_and_stay_in_range() -> None:
    shown = torch.zeros(40, 3, 32, 32)
    shown[:, :, 10:22, 10:22] = 1
    moved = augmented(shown, torch.Generator().manual_seed(0))
    assert moved.shape == shown.shape and moved.min() >= 0 and moved.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 40
    mass = moved[:, 0] - moved[:, 0].amin((1, 2), keepdim=True)
    rows = (mass.sum(2) * torch.arange(32.0)).sum(1) / mass.sum((1, 2))
    assert (rows - 15.5).abs().max() < 4 and rows.std() > 0.3  # up to 2 pixels, and what turning adds
