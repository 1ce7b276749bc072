"""All 19 corruptions repeat exactly, for each image by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weightlab_evals.images.corruptions import corrupt, corrupted, corruptions, key_of
from weightlab_evals.images.data import Images, open_images

from tests.evals.images.machine import NAMES, with_corruptions
from tests.evals.images.test_data import picture
from weightlab.errors import UsageError

pytestmark = with_corruptions


def images(count: int = 3, side: int = 32, name: str = "set") -> Images:
    return Images(name, np.zeros(count, dtype=np.int64), lambda place: picture(place, side))


def all_of(found: Images) -> list[list[int]]:
    return [found.read(place).reshape(-1).tolist() for place in range(len(found))]


def test_there_are_nineteen() -> None:
    assert len(corruptions()) == 19


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [28, 32])
def test_each_repeats_with_its_key(name: str, side: int) -> None:
    before: Any = np.random.get_state()  # noqa: NPY002
    first, again, other = (corrupt(picture(0, side), name, 5, key) for key in (1, 1, 2))
    assert first.shape == (side, side, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, picture(0, side))
    drawn = name not in (
        "gaussian_blur",
        "defocus_blur",
        "zoom_blur",
        "contrast",
        "brightness",
        "saturate",
        "jpeg_compression",
        "pixelate",
    )
    assert np.array_equal(first, other) != drawn
    after: Any = np.random.get_state()  # noqa: NPY002 (the caller's generator goes on as it was)
    assert np.array_equal(after[1], before[1]) and after[2] == before[2]


@pytest.mark.parametrize("name", ["impulse_noise", "gaussian_noise", "snow"])
def test_it_does_not_matter_what_else_is_corrupted(tmp_path: Path, name: str) -> None:
    many = all_of(corrupted(images(3), name, 3, 0, tmp_path / "a"))
    few = all_of(corrupted(images(3).first(2), name, 3, 0, tmp_path / "b"))
    assert many[:2] == few
    assert many == all_of(corrupted(images(3), name, 3, 0, tmp_path / "a"))  # from the cache
    assert len(list((tmp_path / "a").iterdir())) == 1
    for changed in (
        corrupted(images(3), name, 3, 1, tmp_path),
        corrupted(images(3, name="else"), name, 3, 0, tmp_path),
    ):
        assert all_of(changed) != many


def test_images_are_read_once_for_all_corruptions_and_once_for_each(tmp_path: Path) -> None:
    reads: list[int] = []

    def read(place: int) -> Any:
        reads.append(place)
        return picture(place, 32)

    counted = Images("set", np.zeros(3, dtype=np.int64), read)
    for name in ("fog", "contrast", "fog"):
        corrupted(counted, name, 1, 0, tmp_path)
    assert len(reads) == 3 * 3


def test_images_of_several_sizes_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    mixed = Images("mixed", np.zeros(2, dtype=np.int64), lambda place: picture(place, 32 + 32 * place))
    found = corrupted(mixed, "gaussian_noise", 5, 0, tmp_path)
    assert found.read(1).shape == (64, 64, 3) and list(tmp_path.iterdir()) == []
    assert np.array_equal(found.read(1), found.read(1))


def test_what_there_is_not(tmp_path: Path) -> None:
    for name, severity in (("fogg", 5), ("fog", 0), ("fog", 6)):
        with pytest.raises(UsageError, match="no corruption"):
            corrupted(images(), name, severity, 0, tmp_path)
    assert len({key_of("a", place, "fog", s, seed) for place in (0, 1) for s in (1, 2) for seed in (0, 1)}) == 8


def test_a_real_set(tmp_path: Path) -> None:
    found = corrupted(open_images("digits").first(5), "gaussian_blur", 5, 0, tmp_path)
    assert found.read(0).shape == (8, 8, 3)
