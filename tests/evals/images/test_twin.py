"""A twin of classifiers is scored as any other classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weightlab_evals.images.data import open_images
from weightlab_evals.images.evaluate import evaluate
from weightlab_evals.images.models import open_classifier
from weightlab_evals.networks import vgg

import weightlab as wl
from weightlab.errors import NamesMismatchError, UsageError

VGG = "weightlab_evals.networks:vgg"


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """Two experts of a small network: one sees dark images, one bright ones."""
    torch.manual_seed(0)
    base = vgg().state_dict()
    save_file(base, tmp_path / "base.safetensors")
    for seed, name in enumerate(("dark", "bright"), 1):
        generator = torch.Generator().manual_seed(seed)
        tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(tuned, tmp_path / f"{name}.safetensors")
    experts = [tmp_path / "dark.safetensors", tmp_path / "bright.safetensors"]
    wl.twin_split(tmp_path / "base.safetensors", experts, tmp_path / "twin", compress="dense:fp32")
    return tmp_path / "twin"


def test_predictions_are_those_of_the_mixtures(twin: Path) -> None:
    images = open_images("digits").first(40)
    with pytest.raises(UsageError, match="no router"):
        evaluate(open_classifier(str(twin), VGG), images, names=[])
    model = wl.TwinModel.over(vgg(), wl.open_twin(twin))
    pixels = open_classifier(str(twin), VGG).prepare([images.read(n) for n in range(40)])
    data = {"dark": [{"images": 0.1 * pixels}], "bright": [{"images": pixels}]}
    wl.save_router(wl.route(model, data, kind="nearest").router, twin)
    found = evaluate(open_classifier(str(twin), VGG), images, names=[], batch=7)
    weights = model.route(images=pixels)
    by_hand = []
    for image, own in zip(pixels, weights, strict=True):
        parts = [model.twin.exclusive[n] * float(w) for n, w in zip(model.names, own, strict=True)]
        with wl.patched(model.module, parts), torch.no_grad():
            by_hand.append(int(model.module(image[None]).argmax()))
    assert found.rows[0].predictions["clean 0"] == by_hand and len(set(by_hand)) > 1


def test_another_network_is_refused(twin: Path) -> None:
    with pytest.raises(NamesMismatchError, match="no twin of"):
        wl.TwinModel.over(torch.nn.Linear(3, 3), wl.open_twin(twin))
