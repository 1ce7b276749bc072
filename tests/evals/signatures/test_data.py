"""The images of the study: parts do not overlap, and corrupted images stay with their labels."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from weightlab_evals.images.data import open_images
from weightlab_evals.signatures.data import part, split

from tests.evals.images.machine import with_corruptions


@pytest.mark.parametrize(("name", "sizes"), [("mnist5k", (1500, 1750, 500, 1250)), ("digits", (0, 1000, 0, 797))])
def test_parts_of_a_set_do_not_overlap(name: str, sizes: tuple[int, ...]) -> None:
    parts = astuple(split(name, 3))
    assert tuple(map(len, parts)) == sizes
    assert all(not set(a) & set(b) for a, b in itertools.combinations(parts, 2))
    assert set(np.concatenate(parts)) == set(range(sum(sizes)))
    assert not np.array_equal(parts[3], split(name, 4).test) and np.array_equal(parts[3], split(name, 3).test)


def test_digits_are_chosen_and_fill_the_frame() -> None:
    places = split("mnist5k", 0).test
    few, all_ = part("mnist5k", places, digits=range(5)), part("mnist5k", places)
    assert set(few.labels.tolist()) == {0, 1, 2, 3, 4} and len(few) < len(all_) == 1250
    assert all_.images.shape == (1250, 3, 32, 32) and all_.images.dtype == torch.uint8
    ink = (all_.images[:, 0].float().mean(0) > 10).float()  # where digits have ink on average
    assert ink.mean() > 0.6  # of 28×28 in a frame it would be a third


@with_corruptions
def test_a_corrupted_image_has_the_label_of_its_clean_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path))
    places = split("digits", 0).test[:50]
    clean, dark = part("digits", places), part("digits", places, "contrast")
    assert torch.equal(clean.labels, dark.labels) and not torch.equal(clean.images, dark.images)
    assert np.array_equal(clean.labels.numpy(), open_images("digits").labels[places])
    a, b = (p.images.float().flatten(1) - p.images.float().flatten(1).mean(1, keepdim=True) for p in (clean, dark))
    alike = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert (alike.argmax(1) == torch.arange(50)).float().mean() > 0.9  # each is most like its own clean one
