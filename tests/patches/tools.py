"""Making patch files that are wrong in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weightlab as wl
from weightlab.patches.patch import Patch, open_patch

Tree = dict[str, Any]


def state(seed: int = 0, change: float = 0.0) -> dict[str, Tensor]:
    """A small model in fp32; with a `change` every float tensor moves by about so much."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "embed.weight": torch.randn(24, 16, generator=generator),
        "layers.0.weight": torch.randn(16, 40, generator=generator),
        "layers.0.bias": torch.randn(16, generator=generator),
        "layers.1.conv": torch.randn(8, 4, 3, 3, generator=generator),
        "steps": torch.tensor(7),
        "temperature": torch.tensor(0.5),
    }
    moved = torch.Generator().manual_seed(seed)
    return {
        name: tensor + change * torch.randn(tensor.shape, generator=moved) if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def make(path: Path, encode: Any = None, **options: Any) -> Patch:
    """The patch from `state()` to a fine-tune of it, at `path`."""
    return wl.diff(state(), state(1, 0.01), path, encode=encode, **options)


def read(path: Path) -> tuple[Tree, Tree, bytes]:
    """A patch file as (container header without metadata, patch header, data)."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    container = json.loads(content[8 : 8 + length])
    header = json.loads(container.pop("__metadata__")["weightlab"])
    return container, header, content[8 + length :]


def write(path: Path, container: Mapping[str, Any], header: Any, data: bytes) -> None:
    """Writes a patch file; `header` may be a text that is no JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    whole = json.dumps({**container, "__metadata__": {"format": "pt", "weightlab": text}}).encode()
    whole += b" " * (-len(whole) % 8)
    path.write_bytes(struct.pack("<Q", len(whole)) + whole + data)


def changed(path: Path, change: Callable[[Tree, Tree], object]) -> Path:
    """Rewrites a patch file after `change(container header, patch header)` edited them."""
    container, header, data = read(path)
    change(container, header)
    write(path, container, header, data)
    return path


def place_of(path: Path, name: str, part: str) -> tuple[int, int]:
    """(offset in the file, length) of a part."""
    extent = open_patch(path)._extents[f"{name}::{part}"]
    return extent.offset, extent.spec.nbytes


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Changes bytes in the middle of a file, and makes sure that it did."""
    before = path.read_bytes()
    after = before[:offset] + content + before[offset + len(content) :]
    assert after != before and len(after) == len(before)
    path.write_bytes(after)
