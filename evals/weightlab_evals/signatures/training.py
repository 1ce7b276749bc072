"""Training and scoring of the study's small networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab_evals.signatures.data import Part

_BATCH = 64
_SCORED = 50


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW with a learning rate that rises and falls once.

    Attributes:
        augment: images are turned, moved and scaled, and their contrast and brightness are changed.
    """

    epochs: int
    rate: float
    augment: bool = False


def train(module: nn.Module, shown: Part, recipe: Recipe, seed: int) -> None:
    """Trains in place; the same for the same seed on the same machine."""
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * math.ceil(len(shown) / _BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), recipe.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    module.train()
    for _ in range(recipe.epochs):
        for places in torch.split(torch.randperm(len(shown), generator=generator), _BATCH):
            images = as_input(shown.images[places])
            if recipe.augment:
                images = augmented(images, generator)
            optimizer.zero_grad()
            torch.autograd.backward([functional.cross_entropy(module(images), shown.labels[places])])
            optimizer.step()
            schedule.step()
    module.eval()


def accuracy(module: nn.Module, shown: Part) -> float:
    """The share of images that are told right."""
    right = 0
    with torch.no_grad():
        for images, labels in zip(torch.split(shown.images, _SCORED), torch.split(shown.labels, _SCORED), strict=True):
            right += int((module(as_input(images)).argmax(1) == labels).sum())
    return right / len(shown)


def as_input(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] as float32 in 0..1."""
    return images.float().div_(255)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each turned by up to 15°, moved by up to 2 pixels, scaled, contrast and brightness changed by up to 30 %."""
    count, side = len(images), images.shape[-1]

    def between(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    angle, size = between(-math.pi / 12, math.pi / 12), between(0.9, 1.1)
    right, down = between(-4 / side, 4 / side), between(-4 / side, 4 / side)
    rows = [torch.stack([angle.cos() * size, -angle.sin() * size, right], 1)]
    rows += [torch.stack([angle.sin() * size, angle.cos() * size, down], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    contrast, brightness = between(0.7, 1.3), between(-0.3, 0.3)
    return (moved * contrast[:, None, None, None] + brightness[:, None, None, None]).clamp_(0, 1)
