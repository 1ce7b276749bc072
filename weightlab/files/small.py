"""A few tensors in memory as one safetensors file, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weightlab.files import disk
from weightlab.files.container import build_header, layout, read_header
from weightlab.tensors.arithmetic import raw_bytes
from weightlab.tensors.spec import BY_TORCH, TensorSpec


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file; the same bytes for the same tensors. Whole or absent is the caller's to see to."""
    specs = {name: TensorSpec(name, BY_TORCH[t.dtype].name, tuple(t.shape)) for name, t in tensors.items()}
    offsets, _ = layout(specs)
    head = build_header(specs, offsets, {"format": "pt"})
    fd = disk.create(path)
    try:
        disk.write_at(fd, head, 0, path)
        for name, tensor in tensors.items():
            disk.write_at(fd, raw_bytes(tensor.detach().cpu()).data, len(head) + offsets[name], path)
        disk.sync_file(fd, path)
    finally:
        os.close(fd)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        MissingInputError, MalformedFileError: see `read_header`.
    """
    header = read_header(path)
    found: dict[str, Tensor] = {}
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name, entry in header.entries.items():
            tensor = entry.spec.empty()
            if tensor.numel():
                disk.read_exactly(fd, entry.offset, tensor.reshape(-1).view(torch.uint8), path)
            found[name] = tensor
    finally:
        os.close(fd)
    return found
