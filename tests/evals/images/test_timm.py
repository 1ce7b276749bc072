"""Models of timm. It needs the torchvision that belongs to the torch at hand, so a stand-in says what timm would."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL.Image import Image as Picture
from safetensors.torch import save_file
from weightlab_evals.images.data import Images
from weightlab_evals.images.models import open_classifier
from weightlab_evals.networks import vgg

from weightlab.errors import InputError, NamesMismatchError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as timm writes it."""
    torch.manual_seed(0)
    save_file(vgg().state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vgg6", "num_classes": 10, "label_names": [f"digit {n}" for n in range(10)]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}))
    return tmp_path


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """timm's three functions that are used; what networks were asked for."""
    asked: list[str] = []

    def create_model(name: str, pretrained: bool) -> torch.nn.Module:
        assert not pretrained
        asked.append(name)
        torch.manual_seed(1)  # other weights than the checkpoint's
        return vgg()

    def transform(picture: Picture) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - 0.5

    data = SimpleNamespace(
        resolve_model_data_config=lambda module: {"mean": 0.5}, create_transform=lambda mean, is_training: transform
    )
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, data=data))
    return asked


def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    return Images("five", np.arange(5), pixels.__getitem__, tuple(f"digit {9 - n}" for n in range(5)))


def test_weights_transform_and_labels_are_the_models_own(folder: Path, standin: list[str]) -> None:
    classifier = open_classifier(str(folder))
    assert standin == [f"local-dir:{folder}"]
    shown = images()
    torch.manual_seed(0)
    network = vgg().eval()
    with torch.no_grad():
        pixels = np.stack([shown.read(n) for n in range(5)])
        expected = network(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5)
    assert torch.allclose(classifier.scores([shown.read(n) for n in range(5)]), expected, atol=1e-5)
    assert classifier.places(shown).tolist() == [9, 8, 7, 6, 5]


def test_a_checkpoint_of_another_network_is_refused(folder: Path, standin: list[str]) -> None:
    save_file({"stem.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(NamesMismatchError, match="timm's vgg6") as caught:
        open_classifier(str(folder))
    assert "stem.weight: not in the network" in str(caught.value)


def test_without_timm_it_is_said_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        open_classifier(str(folder))
    assert "pip install timm" in str(caught.value)


def test_a_damaged_config_is_an_error(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not proper JSON"):
        open_classifier(str(folder))
