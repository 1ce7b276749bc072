"""The tensors of an adapter's file as changes of the network's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.changes import Addition, Change, Folded, Product, Rows, Stacked, Values
from weightlab.adapters.config import CONFIG, AdapterConfig, ExpertsLayout, read_config
from weightlab.adapters.files import companions_of, opened, weights_of
from weightlab.adapters.keys import INNER, plain_keys
from weightlab.adapters.kinds import THROUGH_PEFT
from weightlab.adapters.lora import FACTOR, LoraModules, owner_of
from weightlab.adapters.orientation import Shapes
from weightlab.adapters.peft_layers import PeftModules
from weightlab.errors import MalformedFileError
from weightlab.sources import Source

_TOKENS = ".trainable_tokens_delta"
_TOKEN_ADAPTER = ".token_adapter"
_NORM = ".ln_tuning_layers."
_EMPTIED = (
    "save it again with the weights gathered: under ZeRO-3 with stage3_gather_16bit_weights_on_model_save, under FSDP "
    "with a full state dict"
)

Network = Callable[[], Any]
"""Makes the network without weights, or gives None where it is not known."""


@dataclass(slots=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        changes: {the network's name of a tensor: what is done to it, in order}.
        notes: what the user should know of it, without its name.
    """

    label: str
    config: AdapterConfig
    changes: dict[str, list[Change]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / CONFIG).is_file()


def read_adapter(
    folder: Path,
    network: Network,
    shapes: Shapes = lambda name: None,
    experts_layout: ExpertsLayout | None = None,
) -> Adapter:
    """Reads an adapter whole, in fp32.

    Args:
        network: makes the model's network, or gives None.
        shapes: of the network's tensors in the model that it goes on, or None.
        experts_layout: how stacked experts lie in `lora_B`, whatever the configuration says.

    Raises:
        UnsupportedFormatError: see `read_config`.
        MissingInputError: its weights are not there.
        MalformedFileError: lists the keys that belong to nothing, and factors that make no sense; or it is empty.
        UsageError: the network is needed and not known; or peft is needed and not installed.
    """
    config = read_config(folder)
    label = str(folder)
    made = cache(network)
    adapter = Adapter(label, config)
    loras = LoraModules(label, config, made, shapes, experts_layout)
    layers = PeftModules(label, config, made)
    unknown: list[str] = []
    for key, tensor, dtype in _tensors(folder, config):
        factor = None if config.through_peft else FACTOR.fullmatch(key)
        if factor:
            loras.modules.setdefault(factor["module"], {})[factor["part"]] = tensor.to(torch.float32)
        elif key.endswith(_TOKENS):
            module = key.removesuffix(_TOKENS).removesuffix(_TOKEN_ADAPTER)
            _add(adapter, f"{module}.weight", Rows(config.tokens_of(module), tensor.to(torch.float32)))
        elif config.through_peft and layers.take(key, tensor):
            continue
        elif "lora_" in key:
            unknown.append(key)
        else:
            name = key.replace(f"{INNER}.", ".").replace(f"{_TOKEN_ADAPTER}.", ".").replace(_NORM, ".")
            _add(adapter, name, Values(tensor.to(torch.float32), dtype=dtype))
    if unknown:
        raise MalformedFileError(f"{label}: these tensors belong to nothing", "get the adapter again", unknown)
    for name, changes in loras.changes().items():
        adapter.changes.setdefault(name, []).extend(changes)
    if layers.modules or layers.shared:
        for module, fold in layers.folds().items():
            for own in fold.changes:
                _add(adapter, f"{owner_of(module)}.{own}", Folded(fold, own))
    if not adapter.changes:
        raise MalformedFileError(f"{label}: it has no tensors", _EMPTIED)
    for changes in adapter.changes.values():  # a saved embedding is what its factors are added to
        changes.sort(key=lambda change: not isinstance(change, Values))
    if all(_is_nothing(change) for changes in adapter.changes.values() for change in changes):
        adapter.notes.append("changes nothing: a factor of each product is zero")
    return adapter


def _tensors(folder: Path, config: AdapterConfig) -> list[tuple[str, Tensor, str]]:
    """(plain key, tensor as it is stored, its dtype) of all files.

    Raises:
        MalformedFileError: lists tensors without elements, which ZeRO-3 leaves of what it has scattered; or tensors
            that are there twice with other values.
    """
    prefix = THROUGH_PEFT[config.kind].prefix if config.through_peft else "lora_"
    with opened([*weights_of(folder), *companions_of(folder)]) as owners:
        plain = plain_keys(str(folder), owners, prefix)
        stored = {key: owners[key].aliases.get(key, key) for key in plain}
        empty = [f"{key} {list(owners[key].specs[name].shape)}" for key, name in stored.items()
                 if not owners[key].specs[name].numel]  # fmt: skip
        if empty:
            raise MalformedFileError(f"{folder}: {len(empty)} of its tensors have no elements", _EMPTIED, empty)
        found: dict[str, tuple[str, Tensor, str]] = {}
        differ: list[str] = []
        for key, name in stored.items():
            tensor = whole(owners[key], name)
            first = found.setdefault(plain[key], (plain[key], tensor, owners[key].specs[name].dtype))
            same = first[1] is tensor or torch.equal(first[1], tensor)
            differ += [] if same else [f"{key}: other values than under {plain[key]}"]
    if differ:
        raise MalformedFileError(
            f"{folder}: tensors are there twice, with other values", "get the adapter again", differ
        )
    return list(found.values())


def _is_nothing(change: Change) -> bool:
    """Whether it adds zeros, whatever it is put on."""
    if isinstance(change, Product):
        return not bool(change.left.any() and change.right.any())
    if isinstance(change, Stacked):
        return not bool(change.up.any() and change.down.any())
    return isinstance(change, Addition) and not bool(change.values.any())


def whole(source: Source, name: str) -> Tensor:
    """A whole tensor of a source, as it is stored."""
    tensor = source.specs[name].empty()
    source.read(name, 0, tensor.reshape(-1).view(torch.uint8))
    return tensor


def fp32(source: Source, name: str) -> Tensor:
    """A whole tensor of a source in fp32."""
    return whole(source, name).to(torch.float32)


def _add(adapter: Adapter, name: str, change: Change) -> None:
    adapter.changes.setdefault(name, []).append(change)
