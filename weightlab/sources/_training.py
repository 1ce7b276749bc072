"""Folders of trainers that hold no plain weights, told apart from a model, with the command that makes one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from weightlab.errors import MissingInputError, UnsupportedFormatError
from weightlab.tensors.order import natural_key

_MOST = 10_000


@dataclass(frozen=True, slots=True)
class _Kind:
    """A trainer's format.

    Attributes:
        file: what its files are called, at the top of the folder or in a folder whose name `folder` fits.
        command: the command for a folder, for the path of the folder with those files.
    """

    what: str
    file: re.Pattern[str]
    folder: re.Pattern[str]
    command: Callable[[Path, Path], str]


def _deepspeed(path: Path, inner: Path) -> str:
    root = next((p for p in (path, *path.parents[:2]) if (p / "zero_to_fp32.py").is_file()), None)
    if root is not None:
        return f"python {root / 'zero_to_fp32.py'} {root} OUT"
    return f"python -m deepspeed.utils.zero_to_fp32 {path if inner != path else path.parent} OUT"


def _distributed(path: Path, inner: Path) -> str:
    torch = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {inner} OUT.pt"
    return f"accelerate merge-weights {inner} OUT, or {torch}" if "pytorch_model_fsdp" in inner.name else torch


def _verl(path: Path, inner: Path) -> str:
    return f"python -m verl.model_merger merge --backend fsdp --local_dir {inner} --target_dir OUT"


def _megatron(path: Path, inner: Path) -> str:
    return f"Megatron Bridge (AutoBridge.export_ckpt) or Megatron-LM's tools/checkpoint/convert.py on {path}"


def _llama(path: Path, inner: Path) -> str:
    return f"python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {path} --output_dir OUT"


_KINDS = (
    _Kind(
        "a checkpoint of DeepSpeed (ZeRO), whose weights lie in pieces",
        re.compile(
            r"(\w*zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt|layer_\d+-model(_\d+)?-model_states\.pt"
        ),
        re.compile(r"global_step\d+(_universal)?|checkpoint"),
        _deepspeed,
    ),
    _Kind(
        "a checkpoint of Megatron, whose weights lie in pieces",
        re.compile(r"model_optim_rng\.pt|model_rng\.pt|latest_checkpointed_iteration\.txt"),
        re.compile(r"iter_\d+|release|mp_rank_\d+(_\d+)*"),
        _megatron,
    ),
    _Kind(
        "a distributed checkpoint of torch (FSDP), whose weights lie in pieces",
        re.compile(r".+\.distcp"),
        re.compile(r"(pytorch_model_fsdp|optimizer|model|weights|dist_ckpt|iter_|dcp|ckpt|checkpoint|step|epoch).*"),
        _distributed,
    ),
    _Kind(
        "a checkpoint of verl: each file is one rank's piece of the weights",
        re.compile(r"model_world_size_\d+_rank_\d+\.pt"),
        re.compile(r"actor|critic|global_step_\d+"),
        _verl,
    ),
    _Kind(
        "a checkpoint of model-parallel Llama: each file is one rank's piece of the weights",
        re.compile(r"consolidated\.0[1-9]\.pth"),
        re.compile(r"(?!)"),
        _llama,
    ),
)
_CHECKPOINT = re.compile(r"(checkpoint|global_step|step|epoch)[-_]?(?P<number>\d+)|epoch=\d+-step=(?P<step>\d+)\.ckpt")
_FOLDERS_OF_CHECKPOINTS = ("checkpoints", "lightning_logs")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")
_STATE = re.compile(
    r"(training_args|optimizer|scheduler|lr_scheduler|scaler|loss_scaler|sampler|rng_state|random_states|dataloader)"
    r"([-_]?\w+)?\.(bin|pt|pth|pkl)"
)


def is_training_file(name: str) -> bool:
    """Whether a file of that name is a trainer's state: an optimizer, random numbers, arguments."""
    return _STATE.fullmatch(name) is not None


def refuse_training(folder: Path) -> None:
    """Raises:
    UnsupportedFormatError: the folder is a trainer's checkpoint in pieces; tells the command that makes a model of it,
        or, where whole checkpoints lie in folders of it, which is the newest.
    """
    names = names_in(folder)
    for kind in _KINDS:
        here = [name for name in names if kind.file.fullmatch(name)]
        inner = folder if here else _inside(folder, names, kind)
        if inner is not None:
            raise UnsupportedFormatError(
                f"{folder}: {kind.what}",
                f"make a model of it first: {kind.command(folder, inner)}",
                here[:8],
            )
    newest = _newest(folder, names)
    if newest is not None and not any(name.endswith(_WEIGHTS) and not is_training_file(name) for name in names):
        raise UnsupportedFormatError(
            f"{folder}: a trainer's output, whose weights lie in folders of it",
            f"give one of them; the newest is {newest}",
        )


def names_in(folder: Path) -> list[str]:
    """The names in a folder, the first ten thousand that the system gives, in natural order.

    Raises:
        MissingInputError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in islice(entries, _MOST)]
    except OSError as error:
        raise MissingInputError(f"{folder}: {error.strerror}", "check the path and its permissions") from error
    return sorted(found, key=natural_key)


def _inside(folder: Path, names: Sequence[str], kind: _Kind, depth: int = 2) -> Path | None:
    """A folder in this one, or in one of those, that has files of that kind; the last by name."""
    for name in reversed(names):
        inner = folder / name
        if kind.folder.fullmatch(name) and inner.is_dir() and not inner.is_symlink():
            within = names_in(inner)
            if any(kind.file.fullmatch(n) for n in within):
                return inner
            deeper = _inside(inner, within, kind, depth - 1) if depth > 1 else None
            if deeper is not None:
                return deeper
    return None


def _newest(folder: Path, names: Sequence[str]) -> Path | None:
    numbered = []
    for name in names:
        match = _CHECKPOINT.fullmatch(name)
        if match is not None:
            numbered.append((int(match["number"] or match["step"]), folder / name))
    if numbered:
        return max(numbered)[1]
    for name in _FOLDERS_OF_CHECKPOINTS:
        if name in names and (folder / name).is_dir() and not (folder / name).is_symlink():
            inner = folder / name
            versions = [n for n in names_in(inner) if re.fullmatch(r"version_\d+", n)]
            if versions:
                return _newest(inner / max(versions, key=lambda n: int(n.partition("_")[2])), ["checkpoints"])
            return _newest(inner, names_in(inner))
    return None
