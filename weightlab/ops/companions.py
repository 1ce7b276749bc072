"""The files beside a model's weights: configuration, tokenizer, licence. A new checkpoint gets them byte for byte.

Files that hold the weights once more in another format are left out: they would still be those from before.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from weightlab.errors import MissingInputError
from weightlab.files import disk
from weightlab.stack.state import FOLDER

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".tar")
_EXPORTS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".mlmodel", ".distcp", ".ot", ".tflite", ".npz")
_NOT_OURS = frozenset((FOLDER, ".git", ".cache", "__pycache__"))
_TEMPORARY = (".partial", ".weightlab-busy", ".lock")


def companions(folder: Path, model_files: Collection[str]) -> tuple[list[Path], list[str]]:
    """Finds the companions of a model.

    Args:
        model_files: names, at the top of the folder, of the model's own files.

    Returns:
        (paths relative to the folder, to copy; names of files that are left out because they hold weights).

    Raises:
        MissingInputError: lists symbolic links that point nowhere.
    """
    kept: list[Path] = []
    left: list[str] = []
    broken: list[str] = []
    for path in _files(folder):
        relative = path.relative_to(folder)
        top = len(relative.parts) == 1
        if (top and path.name in model_files) or path.name.endswith(_TEMPORARY):
            continue
        if path.name.endswith(_EXPORTS) or (top and path.name.endswith(_WEIGHTS) and path.name != "training_args.bin"):
            left.append(str(relative))
        elif path.is_symlink() and not path.exists():
            broken.append(str(relative))
        elif path.is_file():
            kept.append(relative)
    if broken:
        raise MissingInputError(
            f"{folder}: symbolic links that point nowhere", "get the files, or remove the links", broken
        )
    return kept, left


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _NOT_OURS and not f.endswith(_TEMPORARY))
        for name in sorted(files):
            yield Path(place) / name


def copy_companions(folder: Path, names: list[Path], out: Path) -> int:
    """Copies companions; returns how many bytes."""
    total = 0
    for name in names:
        missing = [p for p in reversed((out / name).parents) if not p.is_dir()]
        for parent in missing:
            disk.make_folder(parent)
        total += disk.copy_file(folder / name, out / name)
    return total
