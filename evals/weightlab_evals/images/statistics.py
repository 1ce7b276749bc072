"""Running statistics of a patched classifier, measured on images."""

from __future__ import annotations

from torch import Tensor

import weightlab as wl
from weightlab_evals.images.corruptions import corrupted
from weightlab_evals.images.data import open_images
from weightlab_evals.images.models import open_classifier

_BATCH = 64


def measured(
    model: str,
    patch: wl.Patch,
    data: str,
    corruption: str | None = None,
    reference: str | None = None,
    limit: int | None = None,
    key: str | None = None,
) -> dict[str, Tensor]:
    """What the normalisation layers of a model see, with a patch on it: one cumulative pass over the images.

    Args:
        data, reference: as for `open_images` and `open_classifier`.
        corruption: corrupts the images at severity 5; None: they are used as they are.

    Returns:
        {name in the files: running mean or variance}.
    """
    images = open_images(data).first(limit)
    if corruption is not None:
        images = corrupted(images, corruption, 5, 0)
    classifier = open_classifier(model, reference, key)

    def batch(start: int) -> Tensor:
        return classifier.prepare([images.read(n) for n in range(start, min(start + _BATCH, len(images)))])

    with wl.patched(classifier.module, patch):
        return wl.recalibrate(classifier.module, (batch(start) for start in range(0, len(images), _BATCH)))
