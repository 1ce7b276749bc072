"""What tests of commands look at."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from tests.conftest import tensors_of


def content(place: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file below a folder; empty folders are there too."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(place.rglob("*"))
    }


def weights(model: str) -> dict[str, Tensor]:
    """All tensors of a folder with one file, or of a file."""
    path = Path(model)
    return tensors_of(path / "model.safetensors" if path.is_dir() else path)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same bits; the models of these tests hold no NaN and no −0."""
    return left.keys() == right.keys() and all(bool((left[n] == right[n]).all()) for n in left)
