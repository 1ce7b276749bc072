"""How a difference is asked for, and what its header says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weightlab as wl
from weightlab.errors import UsageError
from weightlab.extract.options import DiffOptions
from weightlab.patches.patch import open_patch


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "o/n.v1-b_2"])
def test_names_on_the_hub(name: str) -> None:
    assert DiffOptions(base_name=name).base_name == name


@pytest.mark.parametrize("name", ["", "/models/a", "a/b/c", "./a", "a/", "~/a", "o/n\n", "a b"])
def test_paths_are_no_names(name: str) -> None:
    with pytest.raises(UsageError, match="no name on the Hub"):
        DiffOptions(base_name=name)


def test_all_that_cannot_be_allowed_is_listed() -> None:
    with pytest.raises(UsageError) as failed:
        DiffOptions(allow=["rows", "columns", "added", "more"])
    assert failed.value.offenders == ("'columns'", "'more'")
    assert list(DiffOptions(allow="rows").allow) == ["rows"]


BASE = {"w": torch.ones(4, 4), "v": torch.ones(4), "gone": torch.ones(2), "same": torch.ones(3)}
TUNED = {"w": torch.full((4, 4), 2.0), "v": torch.full((4,), 3.0).double(), "new": torch.ones(1), "same": torch.ones(3)}


def test_the_record_of_each_kind(tmp_path: Path) -> None:
    options = {"base_name": "o/n", "revision": "r", "license": "mit", "notes": "n", "allow": ["added", "removed"]}
    wl.diff(BASE, TUNED, tmp_path / "p.safetensors", encode={"v": "dense", "w": "exact"}, **options)
    patch = open_patch(tmp_path / "p.safetensors")
    header, records = patch.header, patch.records
    assert (header.base.name, header.base.revision, header.license, header.notes) == ("o/n", "r", "mit", "n")
    assert header.base.fingerprint and set(records) == {"w", "v", "new", "gone"}
    w, v, new, gone = (records[name] for name in ("w", "v", "new", "gone"))
    assert w.encoding == "exact" and w.error is None and w.base_digest and w.result_digest
    assert (w.added, w.base_dtype, w.base_shape, w.shape, w.dtype) == (False, None, None, [4, 4], "F32")
    assert v.encoding == "dense" and v.error is not None and v.base_digest and v.result_digest is None
    assert (v.dtype, v.base_dtype, v.error.max_abs, v.error.relative_l2) == ("F32", None, 0.0, 0.0)
    wide = wl.diff(BASE, BASE | {"v": TUNED["v"]}, encode="exact").records["v"]  # only exact keeps the tuned dtype
    assert (wide.dtype, wide.base_dtype) == ("F64", "F32")
    assert new.added and new.encoding == "exact" and new.base_digest is None and new.result_digest
    assert gone.encoding == "removed" and gone.base_digest and gone.parts == {} and gone.result_digest is None


def test_what_takes_the_place_of_an_encoding_that_does_not_suit() -> None:
    patch = wl.diff(BASE, BASE | {"v": torch.zeros(4), "w": torch.zeros(4, 4)}, encode="low_rank:1")
    assert patch.records["v"].encoding == "dense" and patch.records["v"].parameters["instead_of"].startswith("low_rank")
    assert "instead_of" not in patch.records["w"].parameters
