"""Factors of matrices, kept on disk while there are more to come."""

from __future__ import annotations

from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from weightlab.encodings.low_rank import factorise
from weightlab.files import disk
from weightlab.files.atomic import atomic_file
from weightlab.files.small import read_tensors, write_tensors
from weightlab.tensors.arithmetic import raw_bytes


class FactorStore:
    """Factorises, or takes what an earlier run made of the same elements.

    Args:
        folder: where; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def factorised(self, matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
        """(left [m, r], right [r, n]), fp32, whose product is near a matrix [m, n]; see `factorise`."""
        rank = None if rank is None else min(rank, *matrix.shape)
        file = None
        if self._folder is not None:
            key = blake3(f"{rank} {energy} {list(matrix.shape)} {torch.__version__} ".encode())
            key.update(raw_bytes(matrix).data)
            file = self._folder / f"{key.hexdigest()}.safetensors"
            if file.exists():
                kept = read_tensors(file)
                return kept["left"], kept["right"]
        left, right = (factor.float().contiguous() for factor in factorise(matrix, rank, energy))
        if file is not None:
            if not file.parent.is_dir():
                disk.make_folder(file.parent)
            with atomic_file(file) as temporary:
                write_tensors(temporary, {"left": left, "right": right})
        return left, right

    def clear(self) -> None:
        """Removes what was kept."""
        if self._folder is not None and self._folder.is_dir():
            disk.remove_tree(self._folder)
