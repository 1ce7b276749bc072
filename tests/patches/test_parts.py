"""Stored parts: ranges, the cache, digests, damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from weightlab.errors import IntegrityError
from weightlab.files.digest import PartDigest
from weightlab.patches.parts import Extent, StoredParts
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.workspace import Workspace


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[StoredParts]:
    """Ten fp32 numbers from byte 8 on, and an empty part."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8) + torch.arange(10.0).numpy().tobytes())
    fd = os.open(path, os.O_RDONLY)
    extents = {
        "delta": Extent(fd, path, 8, TensorSpec("delta", "F32", (2, 5))),
        "none": Extent(fd, path, 48, TensorSpec("none", "U16", (0,))),
    }
    yield StoredParts(TensorSpec("w", "F32", (10,)), {"a": 1}, extents)
    os.close(fd)


def test_ranges(parts: StoredParts) -> None:
    workspace = Workspace()
    assert parts.read("delta", 3, 6, workspace).tolist() == [3.0, 4.0, 5.0]
    assert parts.read("delta", 0, 10, workspace).tolist() == [*range(10)]
    assert parts.read("delta", 10, 10, workspace).tolist() == []
    assert parts.read("none", 0, 0, workspace).dtype == torch.uint16
    assert (parts.numel("delta"), parts.numel("none")) == (10, 0)
    assert parts.whole("delta").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (-1, 3), (6, 5)])
def test_ranges_outside_a_part_are_refused(parts: StoredParts, start: int, stop: int) -> None:
    with pytest.raises(IntegrityError, match="w: its part 'delta' is too short"):
        parts.read("delta", start, stop, Workspace())


def test_what_is_cached_is_made_once_and_forgotten_on_release(parts: StoredParts) -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        return len(calls)

    assert [parts.cached("x", make), parts.cached("x", make)] == [1, 1]
    assert parts.whole("delta") is parts.whole("delta")
    parts.release()
    assert parts.cached("x", make) == 2


def test_a_digest_covers_dtype_bytes_and_shape(parts: StoredParts) -> None:
    digest = PartDigest("F32")
    digest.update(torch.arange(10.0).numpy().tobytes())
    assert parts.digest("delta", Workspace()) == digest.hexdigest((2, 5))
    assert digest.hexdigest((2, 5)) != digest.hexdigest((5, 2)) != digest.hexdigest((10,))
    assert parts.digest("none", Workspace()) == PartDigest("U16").hexdigest((0,))
    assert PartDigest("U16").hexdigest((0,)) != PartDigest("I16").hexdigest((0,))


def test_a_file_that_was_cut_off_is_an_integrity_error(parts: StoredParts) -> None:
    os.truncate(parts.extents["delta"].path, 20)
    with pytest.raises(IntegrityError, match="ends at byte 20"):
        parts.read("delta", 0, 10, Workspace())
    with pytest.raises(IntegrityError, match="ends at byte 20"):
        parts.digest("delta", Workspace())
