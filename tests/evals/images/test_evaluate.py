"""Classifiers with patches in memory: the predictions of what `apply --out` writes, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weightlab_evals.images.data import Images
from weightlab_evals.images.evaluate import Evaluation, evaluate
from weightlab_evals.images.models import open_classifier
from weightlab_evals.images.plot import plot_scales
from weightlab_evals.networks import vgg, vgg_bn

import weightlab as wl
from tests.evals.images.machine import with_corruptions
from tests.evals.images.test_data import picture
from weightlab.errors import InputError, MisfitError, MissingInputError, NamesMismatchError, UsageError

pytestmark = with_corruptions
CNN = "weightlab_evals.networks:vgg"
IMAGES = Images("set", np.arange(12) % 10, lambda place: picture(place, 32))


def saved_cnn(path: Path) -> Path:
    torch.manual_seed(0)
    save_file(vgg().state_dict(), path)
    return path


def saved_hf(path: Path, kind: str) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    shape |= {"patch_size": 8, "num_labels": 10}
    if kind == "vit":
        hf.ViTForImageClassification(hf.ViTConfig(**shape, intermediate_size=32)).save_pretrained(path)
        hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    else:
        hf.Dinov2ForImageClassification(hf.Dinov2Config(**shape, mlp_ratio=2)).save_pretrained(path)
        hf.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def moved(model: Path, size: float) -> wl.Patch:
    file = model / "model.safetensors" if model.is_dir() else model
    state = load_file(file)
    generator = torch.Generator().manual_seed(3)
    tuned = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    return wl.diff(
        state, tuned, file.parent.parent / "p.safetensors" if model.is_dir() else file.parent / "p.safetensors"
    )


@pytest.mark.parametrize("kind", ["cnn", "vit", "dinov2"])
def test_in_memory_is_what_is_written(tmp_path: Path, kind: str) -> None:
    model = saved_cnn(tmp_path / "m.safetensors") if kind == "cnn" else saved_hf(tmp_path / "m", kind)
    reference = CNN if kind == "cnn" else None
    patch = moved(model, 0.3)
    options: dict[str, Any] = {
        "names": ["gaussian_noise", "contrast"],
        "severities": [1, 5],
        "cache": tmp_path / "cache",
    }
    found = evaluate(open_classifier(str(model), reference), IMAGES, [patch], scales=[0.0, 0.5, 1.0], **options)
    assert [row.scale for row in found.rows] == [0.0, 0.0, 0.5, 1.0]
    assert found.rows[1].predictions == found.rows[0].predictions  # at scale 0 it is the model itself
    assert found.rows[3].predictions != found.rows[0].predictions
    for row in found.rows[2:]:
        out = tmp_path / f"out-{row.scale}{'.safetensors' if kind == 'cnn' else ''}"
        wl.apply(model, row.scale * patch, out=out)
        (alone,) = evaluate(open_classifier(str(out), reference), IMAGES, **options).rows
        assert alone.predictions == row.predictions and alone.cells == row.cells
    again = evaluate(open_classifier(str(model), reference), IMAGES, [patch], scales=[0.0, 0.5, 1.0], **options)
    assert again == found
    assert len(found.rows[0].cells) == 5 and found.rows[0].mce == 1.0


def evaluated(tmp_path: Path, **options: Any) -> Evaluation:
    model = saved_cnn(tmp_path / "m.safetensors")
    return evaluate(open_classifier(str(model), CNN), IMAGES, [moved(model, 0.3)], cache=tmp_path / "cache", **options)


def test_what_is_written_down(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = evaluated(tmp_path, names=["fog"], scales=[1.0], batch=5, progress=lambda a, b: told.append((a, b)))
    assert told[-1] == (48, 48) and told[0] == (5, 48)
    found.save(tmp_path / "r.json")
    tree = json.loads((tmp_path / "r.json").read_text())
    assert tree["schema_version"] == 1 and tree["data_digest"] == IMAGES.digest() and tree["seed"] == 0
    assert tree["versions"]["corrupt-tta"] and tree["rows"][1]["patches"][0]["scale"] == 1.0
    cell = tree["rows"][0]["cells"][0]
    right = sum(p == y for p, y in zip(tree["rows"][0]["predictions"]["clean 0"], IMAGES.labels.tolist(), strict=True))
    assert (cell["corruption"], cell["images"], cell["correct"]) == ("clean", 12, right)
    assert found.rows[0].accuracy() == right / 12
    plot_scales(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_data_that_is_corrupted_already(tmp_path: Path) -> None:
    cells = {("fog", s): Images("set", IMAGES.labels, lambda p, s=s: picture(p + 20 * s, 32)) for s in (2, 5)}  # type: ignore[misc]
    ready = Images("set", IMAGES.labels, cells["fog", 2].read, (), cells)
    classifier = open_classifier(str(saved_cnn(tmp_path / "m.safetensors")), CNN)
    found = evaluate(classifier, ready, severities=[2, 5])
    assert [(c["corruption"], c["severity"]) for c in found.rows[0].cells] == [("fog", 2), ("fog", 5)]
    with pytest.raises(UsageError) as failed:
        evaluate(classifier, ready, names=["fog", "snow"], severities=[3, 5])
    assert failed.value.offenders == ("snow", "fog 3", "snow 3", "snow 5")


def test_labels_that_do_not_fit_the_model(tmp_path: Path) -> None:
    classifier = open_classifier(str(saved_cnn(tmp_path / "m.safetensors")), CNN)
    for labels, classes in (([0, 10], ()), ([0, -1], ()), ([0, 1], ("a", "b")), ([0, 1], tuple("abcdefghijkl"))):
        wrong = Images("set", np.asarray(labels), IMAGES.read, classes)
        with pytest.raises(InputError, match="tells 10 apart"):
            evaluate(classifier, wrong, names=[])


def test_patches_that_do_not_fit_are_found_before_anything_is_predicted(tmp_path: Path) -> None:
    classifier = open_classifier(str(saved_cnn(tmp_path / "m.safetensors")), CNN)
    other = wl.diff({"nowhere": torch.zeros(2)}, {"nowhere": torch.ones(2)})
    told: list[int] = []
    with pytest.raises(MisfitError):
        evaluate(classifier, IMAGES, [other], names=[], progress=lambda done, total: told.append(done))
    assert told == []


def test_class_folders_may_go_by_the_names_of_the_model(tmp_path: Path) -> None:
    classifier = open_classifier(str(saved_hf(tmp_path / "m", "vit")))
    assert classifier.places(Images("set", np.asarray([0, 1]), IMAGES.read, ("LABEL_7", "LABEL_2"))).tolist() == [7, 2]


def test_models_that_are_none(tmp_path: Path) -> None:
    save_file(vgg_bn().state_dict(), tmp_path / "bn.safetensors")
    with pytest.raises(NamesMismatchError) as failed:
        open_classifier(str(tmp_path / "bn.safetensors"), CNN)
    assert any("not in the checkpoint" in o for o in failed.value.offenders)
    assert any("not in the network" in o for o in failed.value.offenders)
    with pytest.raises(MissingInputError, match=r"config\.json"):
        open_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot load it"):
        open_classifier(str(tmp_path))
