"""The tensors of an adapter's file as changes of the network's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.changes import Addition, Change, Dora, Product, Rows, Stacked, Values
from weightlab.adapters.config import CONFIG, AdapterConfig, read_config
from weightlab.errors import MalformedFileError, MissingInputError, UsageError
from weightlab.sources import Source, open_source

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_INNER = ".base_layer"

Network = Callable[[], Any]
"""Makes the network without weights, or gives None where it is not known."""


@dataclass(slots=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        changes: {the network's name of a tensor: what is done to it, in order}.
    """

    label: str
    config: AdapterConfig
    changes: dict[str, list[Change]] = field(default_factory=dict)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (path / CONFIG).is_file()


def read_adapter(folder: Path, network: Network) -> Adapter:
    """Reads an adapter whole, in fp32.

    Raises:
        UnsupportedFormatError: see `read_config`.
        MissingInputError: its weights are not there.
        MalformedFileError: lists the keys that belong to nothing.
        UsageError: the network is needed and not known.
    """
    config = read_config(folder)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise MissingInputError(f"{folder}: an adapter without weights", f"it needs {_FILES[0]}")
    source = open_source(file)
    try:
        tensors = {name.removeprefix(_PREFIX): fp32(source, name) for name in source.specs}
    finally:
        source.close()
    adapter = Adapter(str(folder), config)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        factor = _FACTOR.fullmatch(key)
        if factor:
            modules.setdefault(factor["module"], {})[factor["part"]] = tensor
        elif key.endswith(_TOKENS):
            module = key.removesuffix(_TOKENS)
            _add(adapter, f"{module}.weight", Rows(config.tokens_of(module), tensor))
        elif "lora_" in key:
            raise MalformedFileError(f"{folder}: what is {key}?", "get the adapter again")
        else:
            _add(adapter, key.replace(f"{_INNER}.", "."), Values(tensor))
    wrong: list[str] = []
    for module, parts in modules.items():
        try:
            _lora(adapter, module, parts, network)
        except KeyError as error:
            wrong.append(f"{module}: {error.args[0]} is missing")
    if wrong:
        raise MalformedFileError(f"{folder}: factors are missing", "get the adapter again", wrong)
    for changes in adapter.changes.values():  # a saved embedding is what its factors are added to
        changes.sort(key=lambda change: not isinstance(change, Values))
    return adapter


def fp32(source: Source, name: str) -> Tensor:
    """A whole tensor of a source."""
    tensor = source.specs[name].empty()
    source.read(name, 0, tensor.reshape(-1).view(torch.uint8))
    return tensor.to(torch.float32)


def _add(adapter: Adapter, name: str, change: Change) -> None:
    adapter.changes.setdefault(name, []).append(change)


def _lora(adapter: Adapter, module: str, parts: dict[str, Tensor], network: Network) -> None:
    config = adapter.config
    owner = module
    while owner.endswith(_INNER):
        owner = owner.removesuffix(_INNER)
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        down, up = parts["lora_embedding_A"], parts["lora_embedding_B"]
        scaling = config.scaling(owner, down.shape[0])
        product = Product(down.T.contiguous(), (up * scaling).T.contiguous())
        _add(adapter, f"{owner}.weight", _with_magnitude(product, parts, transposed=False))
        return
    down, up = parts["lora_A.weight"], parts["lora_B.weight"]
    targets = config.parameters_of(owner)
    if targets:
        _add_to_parameter(adapter, module, owner, targets, (down, up), network)
        return
    scaling = config.scaling(owner, down.shape[0])
    left, right = up.flatten(1) * scaling, down.flatten(1)
    product = Product(right.T.contiguous(), left.T.contiguous()) if config.fan_in_fan_out else Product(left, right)
    _add(adapter, f"{owner}.weight", _with_magnitude(product, parts, transposed=config.fan_in_fan_out))
    if "lora_B.bias" in parts:
        _add(adapter, f"{owner}.bias", Addition(parts["lora_B.bias"] * scaling))


def _with_magnitude(product: Product, parts: dict[str, Tensor], *, transposed: bool) -> Change:
    magnitude = parts.get("lora_magnitude_vector")
    return product if magnitude is None else Dora(product, magnitude, transposed)


def _add_to_parameter(
    adapter: Adapter, module: str, owner: str, targets: list[str], factors: tuple[Tensor, Tensor], network: Network
) -> None:
    """peft wraps a module once for each of its parameters that is a target: the innermost is the module's first."""
    made = network()
    inner: Any = made.get_submodule(owner) if made is not None else None
    if inner is not None:
        targets = [name for name, _ in inner.named_parameters(recurse=False) if name in targets]
    elif len(targets) > 1:
        raise UsageError(
            f"{adapter.label}: which of {', '.join(targets)} a factor is for depends on the network",
            "put it on a folder with the model's config.json",
        )
    name = targets[len(targets) - 1 - module.removeprefix(owner).count(_INNER)]
    in_first = None if inner is None else bool(getattr(inner, "is_transposed", False))
    _add(adapter, f"{owner}.{name}", Stacked(*factors, partial(adapter.config.scaling, f"{owner}.{name}"), in_first))
