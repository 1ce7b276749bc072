"""Checkpoints pickled by torch: `.bin`, `.pt`, `.pth`, `.ckpt`, `.tar`, a file or a folder with one or with shards.

Opened with `torch.load(weights_only=True)` and nothing else, and mapped where the file's format allows: a pickle
that wants to run code is refused.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.errors import (
    InputError,
    MalformedFileError,
    MissingInputError,
    UnsafePickleError,
    UnsupportedFormatError,
)
from weightlab.sources._quantised import codes_in, opaque_names, read_config
from weightlab.sources.virtual.memory import MemorySource

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar", ".tar")
_INDEX = ".bin.index.json"
_USUAL_KEYS = ("state_dict", "model", "model.state_dict", "model_state_dict", "module")
_REFUSED = {
    ".distcp": "a torch distributed checkpoint; convert it with torch.distributed.checkpoint.format_utils",
    ".gguf": "a GGUF file beside no other weights; name the file itself, which is read dequantised",
    ".ggml": "a GGML file, which holds quantised codes",
    ".nemo": "a NeMo archive; extract its weights first",
    ".h5": "a Keras or TensorFlow file; convert it to safetensors",
    ".msgpack": "a Flax file; convert it to safetensors",
    ".onnx": "an ONNX graph; export the weights to safetensors",
    ".mlmodel": "a Core ML model",
}


class PickledSource(MemorySource):
    """A state dict found in pickles. `config` is the folder's config.json, if there is one."""

    def __init__(self, path: Path, state: Mapping[str, Tensor], folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        super().__init__(state, str(path), path)
        self.codes = codes_in(self.specs, self.config)
        self.opaque = opaque_names(self.specs, self.codes)


class _Pickled:
    def claims(self, path: Path) -> bool:
        refused = [path] if path.is_file() else sorted(path.iterdir())
        found = _find(path)
        if found is None:
            for file in refused:
                if file.suffix in _REFUSED:
                    raise UnsupportedFormatError(f"{file}: {_REFUSED[file.suffix]}", "weightlab does not read it")
        return found is not None

    def open(self, path: Path, key: str | None) -> PickledSource:
        anchor = _find(path)
        if anchor is None:
            raise MissingInputError(f"{path}: no pickled checkpoint", "check the path")
        if anchor.name.endswith(_INDEX):
            return PickledSource(path, _load_shards(anchor), anchor.parent)
        return PickledSource(path, state_dict_in(load(anchor), anchor, key), anchor.parent)


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.name.endswith((*SUFFIXES, _INDEX)) else None
    for names in ((f"pytorch_model{_INDEX}",), ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")):
        for name in names:
            if (path / name).is_file():
                return path / name
    rest = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
    rest = [p for p in rest if p.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")]
    if len(rest) > 1:
        raise MalformedFileError(
            f"{path}: {len(rest)} files could be the model", "give the path of one", [p.name for p in rest]
        )
    return rest[0] if rest else None


def load(path: Path) -> Any:
    """Unpickles a file without running code from it; tensors stay mapped where the format allows.

    Raises:
        UnsafePickleError: the pickle asks for something other than tensors and plain containers.
        MalformedFileError: it is no pickle of torch, or damaged.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format from before zip files
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()
        reason = next((line.strip() for line in first if "Unsupported" in line or "GLOBAL" in line), first[0])
        if "Weights only load failed" in str(error) and ("GLOBAL" in str(error) or "Unsupported" in str(error)):
            raise UnsafePickleError(
                f"{path}: this pickle wants to run code when it is opened, and is refused",
                "ask its author for safetensors, or convert it yourself where you trust it",
                [reason[:300]],
            ) from error
        raise MalformedFileError(f"{path}: not a pickle of torch: {reason[:200]}", "get the file again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MalformedFileError(f"{path}: cannot be unpickled: {reason[:200]}", "get the file again") from error


def state_dict_in(content: Any, path: Path, key: str | None) -> dict[str, Tensor]:
    """Finds the state dict in what was unpickled: the content itself, or under a usual or a given key.

    Raises:
        InputError: there is none, or more than one candidate; says which keys there are.
    """
    if key is not None:
        found = _at(content, key)
        if not _is_state(found):
            raise InputError(f"{path}: no state dict at --key {key}", f"there is: {_describe(content)}")
        return dict(found)
    candidates = {k: _at(content, k) for k in _USUAL_KEYS}
    states = {k: v for k, v in candidates.items() if _is_state(v)}
    if _is_state(content):
        return dict(content)
    if len(states) == 1:
        return dict(next(iter(states.values())))
    what = f"{len(states)} state dicts ({', '.join(states)})" if states else "no state dict"
    raise InputError(f"{path}: {what} found", f"name one with --key; there is: {_describe(content)}")


def _at(content: Any, key: str) -> Any:
    if isinstance(content, Mapping) and key in content:
        return content[key]
    for word in key.split("."):
        if not isinstance(content, Mapping) or word not in content:
            return None
        content = content[word]
    return content


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "keys " + ", ".join(f"{k} ({type(v).__name__})" for k, v in list(content.items())[:12])
    return type(content).__name__


def _load_shards(anchor: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(anchor.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedFileError(f"{anchor}: has no weight_map of names to files", "get the file again") from error
    outside = [repr(f) for f in files if not isinstance(f, str) or Path(f).name != f]
    if outside:
        raise MalformedFileError(f"{anchor}: points outside its folder", "do not use this file", outside)
    missing = [f for f in files if not (anchor.parent / f).is_file()]
    if missing:
        raise MissingInputError(
            f"{anchor}: {len(missing)} of {len(files)} shards are missing", "get the missing files", missing
        )
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    for file in files:
        for name, tensor in state_dict_in(load(anchor.parent / file), anchor.parent / file, None).items():
            if name in state or weight_map.get(name) != file:
                wrong.append(f"{name}: in {file}, and the index says {weight_map.get(name)}")
            state[name] = tensor
    wrong += [f"{n}: not in {f}" for n, f in weight_map.items() if n not in state]
    if wrong:
        raise MalformedFileError(f"{anchor}: the index and the shards disagree", "get the files again", wrong)
    return state


SOURCE = _Pickled()
