"""The 19 corruptions of ImageNet-C, each image's own noise repeatable by itself, kept on disk.

corrupt-tta draws from numpy's global generator, and for impulse noise from one that nobody can seed. Both are set for
each image from (data set, place of the image, seed), so that an image is corrupted in the same way whichever others
are corrupted with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import numpy as np
from blake3 import blake3

from weightlab.errors import InputError, UsageError
from weightlab.files.atomic import atomic_file
from weightlab_evals.images.data import Image, Images

_global_generator = Lock()


def corruptions() -> list[str]:
    """Their names.

    Raises:
        UsageError: corrupt-tta is not installed, or the OpenCV that it uses cannot be loaded.
    """
    try:
        import corrupt_tta
    except ImportError as error:
        raise UsageError(
            f"corruptions need corrupt-tta, which cannot be imported: {error}",
            "pip install 'weightlab[vision]'; where libGL is missing, pip install opencv-python-headless in its place",
        ) from error
    return list(corrupt_tta.corruption_dict)


def corrupt(image: Image, name: str, severity: int, key: int) -> Image:
    """One image, corrupted; the same for the same key.

    Args:
        severity: 1 to 5.
        key: of 32 bits.
    """
    import corrupt_tta.corruptions as tta
    from skimage.util import random_noise

    function: Callable[..., object] = getattr(tta, name)
    with _global_generator:
        before, noise = np.random.get_state(), tta.random_noise  # noqa: NPY002
        try:
            np.random.seed(key)  # noqa: NPY002 (what corrupt-tta draws from)
            tta.random_noise = partial(random_noise, rng=np.random.default_rng(key))
            found = function(image, severity)
        finally:
            np.random.set_state(before)  # noqa: NPY002
            tta.random_noise = noise
    return np.clip(np.rint(np.asarray(found, dtype=np.float64)), 0, 255).astype(np.uint8)


def key_of(dataset: str, place: int, name: str, severity: int, seed: int) -> int:
    """The key of an image's noise."""
    return int.from_bytes(blake3(f"{dataset}\0{place}\0{name}\0{severity}\0{seed}".encode()).digest()[:4], "little")


def corrupted(images: Images, name: str, severity: int, seed: int, cache: Path | None = None) -> Images:
    """All images of a set, corrupted; images of one size are kept in the cache.

    Args:
        cache: the folder; None: `default_cache()`.

    Raises:
        UsageError: no such corruption or severity.
        InputError: the corruption cannot be made of images so small.
    """
    if name not in corruptions() or severity not in range(1, 6):
        raise UsageError(f"no corruption {name!r} at {severity}", f"1 to 5 of: {', '.join(corruptions())}")
    shapes = images.shapes()
    if len(shapes) > 1:  # nothing is kept, and each is made when it is asked for
        return Images(
            images.name, images.labels, lambda place: _one(images, place, name, severity, seed), images.classes
        )
    folder = default_cache() if cache is None else cache
    words = [images.digest(), images.name, name, str(severity), str(seed), version("corrupt-tta"), version("numpy")]
    file = folder / f"{blake3(chr(0).join(words).encode()).hexdigest()[:32]}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (shape,) = shapes
        with atomic_file(file, overwrite=True) as temporary:
            made = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(images), *shape))
            for place in range(len(images)):  # one at a time: the whole set need not fit in memory
                made[place] = _one(images, place, name, severity, seed)
            made.flush()
            del made
    kept = np.load(file, mmap_mode="r", allow_pickle=False)
    return Images(images.name, images.labels, lambda place: np.asarray(kept[place]), images.classes)


def _one(images: Images, place: int, name: str, severity: int, seed: int) -> Image:
    image = images.read(place)
    try:
        return corrupt(image, name, severity, key_of(images.name, place, name, severity, seed))
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"{images.name}: {name} cannot be made of an image of {image.shape[0]}×{image.shape[1]}: {error}",
            "make the images larger, or leave this corruption out",
        ) from error


def default_cache() -> Path:
    """$WEIGHTLAB_CACHE, else ~/.cache/weightlab; the part of it that is for corrupted images."""
    return Path(os.environ.get("WEIGHTLAB_CACHE") or Path.home() / ".cache" / "weightlab").expanduser() / "corrupted"
