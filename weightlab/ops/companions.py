"""The files beside a model's weights: configuration, tokenizer, licence. A new checkpoint gets them byte for byte.

What holds other weights is left out, in sub-folders too: the same ones in another format would still be those from
before, and a trainer's state is no part of a model. So is an adapter, which loaders would put on top again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from weightlab.errors import MissingInputError
from weightlab.files import disk
from weightlab.files.links import open_inside, refuse_leading_out
from weightlab.sources import is_adapter_file, is_training_file
from weightlab.stack.state import FOLDER

Kind: TypeAlias = Literal["weights", "adapter", "training"]

_REASONS: dict[Kind, str] = {
    "weights": "other weights, without the patch",
    "adapter": "an adapter, which loaders would put on top",
    "training": "a trainer's, not the model's",
}

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data"),
    *(".h5", ".keras", ".msgpack", ".mlmodel", ".distcp", ".ot", ".tflite", ".npz", ".nemo", ".pdparams", ".engine"),
    *(".pb", ".litertlm", ".task", ".pte"),
)
_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
_ADAPTER_CONFIG = "adapter_config.json"
_OF_TRAINERS = frozenset(("trainer_state.json", "zero_to_fp32.py"))
_FOLDERS_OF_TRAINERS = re.compile(
    r"checkpoint-\d+|global_step\d+|iter_\d+|(pytorch_model_fsdp|optimizer)_\d+|runs|wandb|lightning_logs"
)
_NOT_OURS = frozenset((FOLDER, ".git", ".cache", "__pycache__"))
_TEMPORARY = (".partial", ".weightlab-busy", ".lock")


def kind_of(name: str) -> Kind | None:
    """What a file is that is no companion, by its path relative to the model; None for a companion."""
    *folders, file = name.rstrip("/").split("/")
    if name.endswith("/") or any(_FOLDERS_OF_TRAINERS.fullmatch(folder) for folder in folders):
        return "training"
    if file == _ADAPTER_CONFIG or is_adapter_file(file):
        return "adapter"
    if file in _OF_TRAINERS or is_training_file(file):
        return "training"
    return "weights" if file.endswith(_WEIGHTS) or _INDEX.fullmatch(file) else None


def reason_of(folder: Path, name: str) -> str:
    """Why something beside a model is left out of a new checkpoint."""
    if name.endswith("/") and (folder / name[:-1]).is_symlink():
        return "a link to a folder, which is not followed"
    kind = kind_of(name)
    return _REASONS[kind] if kind is not None else "no plain file"


def companions(folder: Path, model_files: Collection[str]) -> tuple[list[Path], list[str]]:
    """Finds the companions of a model.

    Args:
        model_files: the model's own files, relative to the folder.

    Returns:
        (paths relative to the folder, to copy; what is left out, folders as a whole with a `/` at the end).

    Raises:
        MissingInputError: lists symbolic links that point nowhere.
        MalformedFileError: lists those that lead out of the folder, see `weightlab.files.links`.
    """
    kept: list[Path] = []
    left: list[str] = []
    broken: list[str] = []
    for name in _files(folder):
        if name in model_files or name.endswith(_TEMPORARY):
            continue
        path = folder / name
        if kind_of(name) is not None:
            left.append(name)
        elif path.is_symlink() and not path.exists():
            broken.append(name)
        elif path.is_file():
            kept.append(Path(name))
        else:
            left.append(name)
    if broken:
        raise MissingInputError(
            f"{folder}: symbolic links that point nowhere", "get the files, or remove the links", broken
        )
    refuse_leading_out(folder, map(str, kept))
    return kept, left


def stale_weights(folder: Path, model_files: Collection[str]) -> list[str]:
    """Files that hold a model's weights once more, and that a change in place leaves as they are."""
    return [
        n for n in _files(folder) if n not in model_files and kind_of(n) == "weights" and not n.endswith(_TEMPORARY)
    ]


def _files(folder: Path) -> Iterator[str]:
    """All files, relative to the folder; of a trainer's folder, and of a link to a folder, its own name, and `/`."""

    def unreadable(error: OSError) -> None:
        raise disk.storage_error(error.filename, error) from error

    for place, folders, files in os.walk(folder, onerror=unreadable):
        relative = Path(place).relative_to(folder)
        inner = sorted(f for f in folders if f not in _NOT_OURS and not f.endswith(_TEMPORARY))
        whole = [f for f in inner if _FOLDERS_OF_TRAINERS.fullmatch(f) or os.path.islink(os.path.join(place, f))]
        yield from (f"{(relative / f).as_posix()}/" for f in whole)
        folders[:] = [f for f in inner if f not in whole]
        yield from ((relative / name).as_posix() for name in sorted(files))


def copy_companions(folder: Path, names: list[Path], out: Path) -> int:
    """Copies companions; returns how many bytes."""
    total = 0
    for name in names:
        make_parents(out, name)
        total += copy_inside(folder, name, out)
    return total


def copy_inside(folder: Path, name: Path, out: Path) -> int:
    """Copies a file of a folder, unless it has become a link out of it; returns how many bytes."""
    fd = open_inside(folder, str(name))
    try:
        return disk.copy_file(folder / name, out / name, opened=fd)
    finally:
        os.close(fd)


def make_parents(out: Path, name: Path) -> None:
    """Makes the folders between `out` and a file in it."""
    for parent in reversed((out / name).parents):
        if not parent.is_dir():
            disk.make_folder(parent)
