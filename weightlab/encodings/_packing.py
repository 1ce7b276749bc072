"""Packing codes of 1 to 8 bits into bytes without gaps: eight codes take as many bytes as a code has bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take: whole groups of eight."""
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes below 2**bits (uint8, flat); the last group is filled up with zeros. The first code is lowest."""
    raw = codes.numpy()
    if bits == 8:
        return torch.from_numpy(np.pad(raw, (0, -len(raw) % 8)))
    groups = np.pad(raw, (0, -len(raw) % 8)).reshape(-1, 8)
    words = np.zeros(len(groups), dtype="<u8")
    for position in range(8):
        words |= groups[:, position].astype("<u8") << np.uint64(bits * position)
    return torch.from_numpy(words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1).copy())


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of what `pack` made, as uint8."""
    raw = packed.numpy()
    if bits == 8:
        return packed[:count]
    padded = np.zeros((len(raw) // bits, 8), dtype=np.uint8)
    padded[:, :bits] = raw.reshape(-1, bits)
    words = padded.view("<u8").reshape(-1)
    codes = np.empty((len(words), 8), dtype=np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for position in range(8):
        codes[:, position] = (words >> np.uint64(bits * position)) & mask
    return torch.from_numpy(codes.reshape(-1)[:count])
