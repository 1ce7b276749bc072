"""Adapters that are no PEFT folders. One file a form; each plug-in is a `FORM` with `claims` and `read`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from weightlab.adapters.config import CONFIG, AdapterConfig
from weightlab.adapters.orientation import Shapes
from weightlab.adapters.reading import Adapter, Network, whole
from weightlab.errors import InputError
from weightlab.files.container import read_header
from weightlab.files.foreign import read_json
from weightlab.registry import Registry
from weightlab.sources import Source, open_source
from weightlab.sources.pickled import SUFFIXES as PICKLES
from weightlab.sources.pickled import load_state

SAFETENSORS, GGUF = ".safetensors", ".gguf"
_SMALL = 2**28  # bytes: a larger pickle is asked for its names only where its own name says adapter
_NAMED = re.compile("adapter|lora", re.IGNORECASE)
# What marks a folder as a model's own.
_MODELS = ("config.json", "model_index.json", "modules.json")
# The usual names of one file in a folder, the first that is there; then a lone file.
_USUAL = (
    *("adapters.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.pt"),
)
_EPOCH = re.compile(r"adapter_(\d+)\.pt")


class AdapterFile:
    """A file that may be an adapter, or the folder that it is in; only headers are read until `tensors`.

    Attributes:
        path: what the user named.
        file: the file with the tensors; None where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path if path.is_file() else _file_in(path)

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the header of a safetensors file says beside its tensors."""
        file = self.file
        return read_header(file).metadata if file is not None and file.name.endswith(SAFETENSORS) else {}

    @cached_property
    def names(self) -> frozenset[str]:
        """The keys of the file; none for one that is too large to be looked into."""
        file = self.file
        if file is None:
            return frozenset()
        if file.name.endswith(SAFETENSORS):
            return frozenset(read_header(file).entries)
        if file.name.endswith(PICKLES) and (file.stat().st_size <= _SMALL or _NAMED.search(file.name)):
            return frozenset(load_state(file).state)
        return frozenset()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The `adapter_config.json` beside it; empty where there is none."""
        place = (self.path if self.path.is_dir() else self.path.parent) / CONFIG
        return read_json(place, dict[str, Any]) if place.is_file() else {}

    def tensors(self) -> dict[str, Tensor]:
        """{key: tensor in fp32} of all that is in the file."""
        if self.file is None:
            return {}
        source = open_source(self.file)
        try:
            stored = {**{name: name for name in source.specs}, **source.aliases}
            return {key: whole(source, name).to(torch.float32) for key, name in stored.items()}
        finally:
            source.close()


def _file_in(folder: Path) -> Path | None:
    if not folder.is_dir() or any((folder / name).is_file() for name in _MODELS):
        return None
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    epochs = {int(found[1]): path for path in files if (found := _EPOCH.fullmatch(path.name)) and len(found[1]) < 9}
    if epochs:
        return epochs[max(epochs)]
    lone = [path for path in files if path.name.endswith((SAFETENSORS, GGUF))]
    return lone[0] if len(lone) == 1 and not any(p.name.endswith(".index.json") for p in files) else None


@dataclass(frozen=True, slots=True)
class Model:
    """What an adapter goes on.

    Attributes:
        base: the clean model; None: names are the adapter's own.
        network: makes the network without weights, or gives None.
        shapes: of the network's tensors in the base.
    """

    base: Source | None
    network: Network
    shapes: Shapes


class Form(Protocol):
    """A plug-in: recognises a form of adapter and reads it."""

    def claims(self, found: AdapterFile) -> bool:
        """Whether it is of this form, by its headers."""

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """What it changes, under the names of the model.

        Raises:
            MalformedFileError: lists modules whose tensors make no sense.
            UnsupportedFormatError: what cannot be computed, by its own name.
            UsageError: something that only the model, or its configuration, tells is needed.
        """


FORMS: Registry[Form] = Registry("weightlab.adapters.forms", "FORM", "form of adapter")


class Scaled(AdapterConfig):
    """The configuration of an adapter whose factors have been scaled already."""

    def scaling(self, module: str, rank: int) -> float:
        return 1.0


def scaled_config(trained_on: object = None) -> AdapterConfig:
    """A configuration that says only what an adapter was trained on."""
    return Scaled(
        alpha=1.0,
        alphas={},
        rslora=False,
        fan_in_fan_out=False,
        dora=False,
        parameters=(),
        tokens={},
        base_name=None,
        revision=None,
        trained_on=trained_on if isinstance(trained_on, str) and trained_on else None,
    )


def form_of(found: AdapterFile) -> Form | None:
    """The form that claims a file; None where none does, or it cannot be read."""
    try:
        return next((form for form in map(FORMS.get, FORMS.names()) if form.claims(found)), None)
    except (InputError, OSError):
        return None
