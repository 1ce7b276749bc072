"""The study's images: two sets of handwritten digits at 32×32, corrupted, and the parts that each step may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightlab_evals.images.corruptions import corrupted
from weightlab_evals.images.data import Images, open_images

SIDE = 32
SEVERITY = 5
CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Part:
    """Images of a set that one step may see.

    Attributes:
        images: uint8 [N, 3, 32, 32].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Split:
    """Places of images in a set, by what they are for; no two overlap."""

    pretrain: NDArray[np.int64]
    train: NDArray[np.int64]
    choose: NDArray[np.int64]
    test: NDArray[np.int64]


def split(name: str, seed: int) -> Split:
    """Another one for each seed: `mnist5k` 1,500 + 1,750 + 500 + 1,250 images; `digits` 0 + 1,000 + 0 + 797."""
    sizes = {"mnist5k": (1500, 1750, 500), "digits": (0, 1000, 0)}[name]
    order = np.random.default_rng(seed).permutation(len(_at_32(name)))
    return Split(*np.split(order, np.cumsum(sizes)))


def part(name: str, places: NDArray[np.int64], corruption: str = CLEAN, digits: range = range(10)) -> Part:
    """Those images of a set that show one of `digits`; clean, or corrupted at severity 5."""
    images, labels = _pixels(name, corruption), _at_32(name).labels
    kept = places[np.isin(labels[places], digits)]
    tensor = torch.from_numpy(images[kept]).permute(0, 3, 1, 2)  # in memory as channels last, which convolutions like
    return Part(tensor, torch.from_numpy(labels[kept]))


@lru_cache(maxsize=64)
def _pixels(name: str, corruption: str) -> NDArray[np.uint8]:
    images = _at_32(name)
    shown = images if corruption == CLEAN else corrupted(images, corruption, SEVERITY, seed=0)
    return np.stack([shown.read(place) for place in range(len(shown))])


@lru_cache(maxsize=4)
def _at_32(name: str) -> Images:
    """Digits of both sets fill the frame: the middle 22×22 of MNIST's, and the 8×8 of `digits`, enlarged."""
    from PIL import Image

    images = open_images(name)
    edge = 3 if name == "mnist5k" else 0
    size, way = (SIDE, SIDE), Image.Resampling.BILINEAR

    def enlarged(place: int) -> NDArray[np.uint8]:
        image = images.read(place)
        inner = image[edge : image.shape[0] - edge, edge : image.shape[1] - edge]
        return np.asarray(Image.fromarray(inner).resize(size, way))

    shown = [enlarged(place) for place in range(len(images))]
    return Images(f"{name}-{SIDE}", images.labels, shown.__getitem__, images.classes)
