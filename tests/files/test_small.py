"""A few tensors as one file, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightlab.errors import MissingInputError, StorageError
from weightlab.files.small import read_tensors, write_tensors

TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "none": torch.empty(0, 4, dtype=torch.float16),
    "one": torch.tensor(7, dtype=torch.int64),
    "turned": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
}


def test_there_and_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    for found in (read_tensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", TENSORS)
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_there_stays_and_what_is_not_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(StorageError):
        write_tensors(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").read_text() == "mine"
    with pytest.raises(MissingInputError, match="nothing"):
        read_tensors(tmp_path / "nothing")
