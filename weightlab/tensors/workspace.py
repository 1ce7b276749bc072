"""Buffers that are made once and used again, tile after tile."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace:
    """Buffers of one worker thread, made once and reused for every tile. `device`: where arithmetic runs."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype, str], Tensor] = {}

    def buffer(self, key: str, numel: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """A flat tensor of `numel` elements; its content is left over from earlier use."""
        held = self._buffers.get((key, dtype, device))
        if held is None or held.numel() < numel:
            held = torch.empty(numel, dtype=dtype, device=device)
            self._buffers[key, dtype, device] = held
        return held[:numel]


class WorkspaceOfThread(threading.local):
    """A workspace for each thread that asks, for what is called from threads that it did not start."""

    def __init__(self) -> None:
        self.workspace = Workspace()
