"""Which file of a folder is the model, where there are several: not an adapter, a trainer's state, or a variant."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.sources._training import is_training_file, refuse_training

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar", ".tar")
PICKLE_INDEX = ".bin.index.json"

_USUAL = ("model", "diffusion_pytorch_model")
_USUAL_PICKLES = (
    *("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"),
)
_VARIANT = re.compile(r"(diffusion_pytorch_|pytorch_)?model\.[\w-]+(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_SHARD = re.compile(r".+-(?P<number>\d{5})-of-(?P<count>\d{5})(\.[\w-]+)?\.(safetensors|bin)")
_ADAPTER = re.compile(
    r"(adapter_model|adapters|adapter_\d+|pytorch_lora_weights|new_embeddings|non_lora_trainables|non_lora_state_dict)\b.*"
    r"\.(safetensors|bin|pt|pth)(\.index\.json)?"
)


def is_adapter_file(name: str) -> bool:
    """Whether a file of that name holds an adapter's tensors, or goes with one."""
    return _ADAPTER.fullmatch(name) is not None


def safetensors_in(folder: Path, set_aside: Callable[[str], str] | None = None) -> Path | None:
    """The safetensors file or index that is the model in a folder; None when there is none.

    The usual names win, an index before a file. A variant (`model.fp16.safetensors`) is not the model where the plain
    file is there, as a pickle too.

    Args:
        set_aside: what a file is called while it is set aside; one that is there under that name counts too.

    Raises:
        MalformedFileError: several files and nothing that says which is the model.
        MissingInputError: shards of more, and no index.
    """
    names = _files(folder)
    if set_aside is not None:
        usually = {name: name.removesuffix(set_aside("")) for name in names}
        names = {old if name != old and set_aside(old) == name else name for name, old in usually.items()}
    usual = [f"{name}{end}" for end in (INDEX_SUFFIX, SUFFIX) for name in _USUAL]
    for name in usual:
        if name in names:
            return folder / name
    found = [n for n in sorted(names) if n.endswith((SUFFIX, INDEX_SUFFIX)) and not is_adapter_file(n)]
    if not names.isdisjoint(_USUAL_PICKLES):
        found = [name for name in found if _VARIANT.fullmatch(name) is None]
    indexes = [name for name in found if name.endswith(INDEX_SUFFIX)]
    return _only(folder, indexes or found)


def pickle_in(folder: Path) -> Path | None:
    """The pickle, or index of pickles, that is the model in a folder; None when there is none.

    Raises:
        MalformedFileError, MissingInputError: as for `safetensors_in`.
        UnsupportedFormatError: see `refuse_training`.
    """
    names = _files(folder)
    for name in _USUAL_PICKLES:
        if name in names:
            return folder / name
    refuse_training(folder)
    found = [n for n in sorted(names) if n.endswith(PICKLES) and not is_adapter_file(n) and not is_training_file(n)]
    return _only(folder, found)


def has_model(folder: Path) -> bool:
    """Whether a folder holds weights that by their names are a whole model: a usual name, shards, or an index."""
    usual = {f"{name}{end}" for end in (INDEX_SUFFIX, SUFFIX) for name in _USUAL} | set(_USUAL_PICKLES)
    names = {name for name in _files(folder) if not is_adapter_file(name)}
    return any(n in usual or n.endswith((INDEX_SUFFIX, PICKLE_INDEX)) or _is_one_of_several(n) for n in names)


def _files(folder: Path) -> set[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise MissingInputError(f"{folder}: {error.strerror}", "check the path and its permissions") from error
    return {name for name in names if not name.startswith(".") and (folder / name).is_file()}


def _only(folder: Path, names: Sequence[str]) -> Path | None:
    if not names:
        return None
    shards = [name for name in names if _is_one_of_several(name)]
    if shards and shards == list(names):
        raise MissingInputError(
            f"{folder}: shards without the index that says which tensor is in which",
            f"get the file *{_index_of(shards)} too, or give the path of one file",
            shards,
        )
    if len(names) > 1:
        raise MalformedFileError(
            f"{folder}: {len(names)} files could be the model and no index says which",
            "give the path of one file, or add the index",
            names,
        )
    return folder / names[0]


def _is_one_of_several(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and int(match["count"]) > 1


def _index_of(shards: Iterable[str]) -> str:
    return INDEX_SUFFIX if all(name.endswith(SUFFIX) for name in shards) else PICKLE_INDEX
