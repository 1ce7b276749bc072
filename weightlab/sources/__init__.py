"""Where tensors come from. One file a kind of source; each plug-in is a `SOURCE` with `claims` and `open`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from weightlab.errors import MissingInputError
from weightlab.registry import Registry
from weightlab.sources._choice import has_model, is_adapter_file
from weightlab.sources._training import is_training_file
from weightlab.tensors.codes import Code
from weightlab.tensors.spec import TensorSpec

__all__ = [
    "SOURCES",
    "Source",
    "SourceKind",
    "cautions_of",
    "has_model",
    "is_adapter_file",
    "is_training_file",
    "open_source",
]


class Source(Protocol):
    """A set of named tensors whose bytes can be read by range, from several threads at a time.

    Attributes:
        label: what to call it in messages.
        specs: every stored tensor by name.
        aliases: further names of stored tensors: {name: the name in `specs` that has the bytes}.
        opaque: names on which no sums are defined, whatever their dtype: codes, and what is no float.
        codes: those of them that are codes of a quantised checkpoint, or belong to some, and what they are.
        path: the file or folder; None for tensors in memory.
    """

    label: str
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    opaque: frozenset[str]
    codes: Mapping[str, Code]
    path: Path | None

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fills `out` (flat uint8) with the tensor's bytes from byte `start` on."""

    def close(self) -> None:
        """Gives back files."""


class SourceKind(Protocol):
    """A plug-in: recognises a path and opens it."""

    def claims(self, path: Path) -> bool:
        """Whether this kind of source reads that file or folder; may raise for one that it refuses by name."""

    def open(self, path: Path, key: str | None) -> Source:
        """Opens it. `key`: where in a nested pickle the state dict lies."""


SOURCES: Registry[SourceKind] = Registry("weightlab.sources", "SOURCE", "source")


def open_source(path: Path, key: str | None = None) -> Source:
    """Opens a checkpoint on disk with the kind of source that claims it.

    Raises:
        MissingInputError: nothing is there, or nothing in it is a checkpoint.
    """
    if not path.exists():
        raise MissingInputError(f"{path}: no such file or folder", "check the path")
    for name in SOURCES.names():
        kind = SOURCES.get(name)
        if kind.claims(path):
            return kind.open(path, key)
    what = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    if any(is_adapter_file(name) for name in what):
        raise MissingInputError(
            f"{path}: holds an adapter, and no model", f"give it as a patch for its base: weightlab apply BASE {path}"
        )
    raise MissingInputError(
        f"{path}: no checkpoint found",
        "give a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder with one",
        [f"holds {', '.join(what[:8]) or 'nothing'}"],
    )


def cautions_of(source: Source) -> list[str]:
    """What whoever uses a source must know, a line each: what was skipped in it, that it is not the original."""
    return list(getattr(source, "cautions", ()))
