"""Images in every layout, and what can be wrong with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from weightlab_evals.images.data import as_rgb, open_images

from weightlab.errors import InputError, MissingInputError


def picture(seed: int, side: int = 6) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def class_folders(path: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for place in range(count):
            Pillow.fromarray(picture(place)).save(path / name / f"{place}.png")
    return path


def test_class_folders(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos", {"cat": 2, "ant": 3})
    (tmp_path / "photos" / "ant" / "notes.txt").write_text("no image")
    Pillow.fromarray(picture(9)[..., 0]).save(tmp_path / "photos" / "cat" / "grey.png")
    found = open_images(str(tmp_path / "photos"))
    assert found.classes == ("ant", "cat") and found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(found.read(1), picture(1)) and found.read(5).shape == (6, 6, 3)
    assert (
        len(found.first(2)) == 2
        and found.first(2).digest() != found.digest() == open_images(str(tmp_path / "photos")).digest()
    )


def test_empty_folders_and_unreadable_images_are_all_listed(tmp_path: Path) -> None:
    photos = class_folders(tmp_path / "photos", {"ant": 2, "bee": 0, "cat": 1, "dog": 0})
    content = (photos / "ant" / "1.png").read_bytes()
    (photos / "ant" / "1.png").write_bytes(content[:40])
    (photos / "cat" / "1.jpg").write_text("no image")
    with pytest.raises(InputError, match="4 folders or images are wrong") as failed:
        open_images(str(photos))
    assert [o.partition(":")[0] for o in failed.value.offenders] == ["bee", "dog", "ant/1.png", "cat/1.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        open_images(str(tmp_path / "empty"))
    with pytest.raises(MissingInputError, match="digits"):
        open_images("digit")


@pytest.mark.parametrize("shape", [(4, 5, 5), (4, 5, 5, 1), (4, 5, 5, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(4, dtype=np.int32))
    found = open_images(str(tmp_path / "x.npz"))
    assert found.labels.tolist() == [0, 1, 2, 3] and found.read(2).shape == (5, 5, 3)
    assert np.array_equal(found.read(2)[..., 0], images[2].reshape(5, 5, -1)[..., 0])


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((2, 3, 3), np.uint8)}, "lacks labels"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(3, int)}, "2 images and labels"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(2)}, "labels float64"),
        ({"images": np.zeros((2, 3, 3)), "labels": np.zeros(2, int)}, "images are uint8"),
        ({"images": np.zeros((2, 3, 3, 4), np.uint8), "labels": np.zeros(2, int)}, "images are uint8"),
        ({"images": np.zeros((0, 3, 3), np.uint8), "labels": np.zeros(0, int)}, "0 images"),
        ({"images": np.asarray([object()] * 2), "labels": np.zeros(2, int)}, "cannot be read"),
    ],
)
def test_npz_files_that_are_wrong(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=says):
        open_images(str(tmp_path / "x.npz"))


def test_no_npz(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match="cannot be read"):
        open_images(str(tmp_path / "x.npz"))


def test_the_layout_of_cifar_10_c(tmp_path: Path) -> None:
    labels = np.tile(np.asarray([3, 1], dtype=np.uint8), 5)
    np.save(tmp_path / "labels.npy", labels)
    images = np.stack([picture(place) for place in range(10)])
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "frost.npy", images[::-1].copy())
    found = open_images(str(tmp_path))
    assert set(found.cells) == {(name, s) for name in ("fog", "frost") for s in range(1, 6)}
    assert found.labels.tolist() == found.cells["fog", 4].labels.tolist() == [3, 1]
    assert np.array_equal(found.cells["fog", 4].read(1), picture(7))
    before = found.digest()
    changed = images.copy()
    changed[9, 0, 0, 0] ^= 1
    np.save(tmp_path / "fog.npy", changed)
    assert open_images(str(tmp_path)).digest() != before
    np.save(tmp_path / "snow.npy", images[:5])
    with pytest.raises(InputError, match="CIFAR-10-C") as failed:
        open_images(str(tmp_path))
    assert failed.value.offenders == ("snow.npy: 5 images, 10 labels",)


def test_the_layout_of_imagenet_c(tmp_path: Path) -> None:
    for corruption in ("fog", "snow"):
        for severity in ("1", "3"):
            class_folders(tmp_path / corruption / severity, {"n01": 1, "n02": 2})
    found = open_images(str(tmp_path))
    assert set(found.cells) == {("fog", 1), ("fog", 3), ("snow", 1), ("snow", 3)}
    assert found.cells["snow", 3].labels.tolist() == [0, 1, 1] and found.classes == ("n01", "n02")
    class_folders(tmp_path / "fog" / "2", {"n01": 1})
    with pytest.raises(InputError, match="different classes"):
        open_images(str(tmp_path))


def test_built_in_sets() -> None:
    digits = open_images("digits")
    assert len(digits) == 1797 and digits.read(0).shape == (8, 8, 3) and set(digits.labels) == set(range(10))
    mnist = open_images("mnist5k")
    assert len(mnist) == 5000 and mnist.read(0).shape == (28, 28, 3) and mnist.read(0).max() == 255


def test_images_are_uint8() -> None:
    with pytest.raises(InputError, match="here"):
        as_rgb(np.zeros((3, 3)), "here")
