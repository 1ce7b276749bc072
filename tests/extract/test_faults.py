"""NaN, infinity and overflow: every tensor is named, nothing is written, and what is allowed is kept as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.extract.test_diff import LOSSY
from weightlab.errors import NonFiniteError, RangeError
from weightlab.stream.executor import Resources

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("encode", ["exact", *LOSSY, {"a": "low_rank:2", "b": "dense", "c": "sign", "*": "exact"}])
@pytest.mark.parametrize("threads", [1, 4])
def test_nan_and_infinity_name_every_tensor(encode: Any, threads: int, tmp_path: Path) -> None:
    base = {name: torch.zeros(20, 20) for name in "abcdef"}
    tuned = {name: torch.ones(20, 20) for name in "abcdef"}
    for name, value in zip("abcd", (NAN, INF, -INF, NAN), strict=True):
        tuned[name][7, 7] = value
    base["e"][1, 1] = INF
    save_file(base, tmp_path / "base.safetensors")
    for place in ("p.safetensors", "p"):
        with pytest.raises(NonFiniteError) as caught:
            wl.diff(
                tmp_path / "base.safetensors",
                tuned,
                tmp_path / place,
                encode=encode,
                resources=Resources(threads=threads, memory=2**31),
            )
        assert caught.value.offenders == (
            "a of state dict",
            "b of state dict",
            "c of state dict",
            "d of state dict",
            f"e of {tmp_path / 'base.safetensors'}",
        )
        assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_nan_in_what_did_not_change_is_no_matter() -> None:
    mask = torch.full((3, 3), -INF)
    assert list(wl.diff({"m": mask, "w": torch.zeros(1)}, {"m": mask.clone(), "w": torch.ones(1)}).records) == ["w"]


def test_nonfinite_where_it_is_allowed() -> None:
    base = torch.zeros(10, 10)
    tuned = torch.ones(10, 10)
    tuned[0, 0], tuned[1, 1], tuned[2, 2] = NAN, INF, -INF
    for encode in ("exact", "dense", "dense:fp16", "sparse:0.9"):
        patch = wl.diff({"w": base}, {"w": tuned}, encode=encode, allow_nonfinite=True)
        got = wl.apply({"w": base}, patch, allow_nonfinite=True)["w"]
        assert torch.isnan(got[0, 0]) and got[1, 1] == INF and got[2, 2] == -INF
        error = patch.records["w"].error
        assert error is None or error.max_abs == (1.0 if encode == "sparse:0.9" else 0.0)
    for encode in ("quantized:4", "low_rank:2", "sign"):
        with pytest.raises(NonFiniteError) as caught:
            wl.diff({"w": base}, {"w": tuned}, encode=encode, allow_nonfinite=True)
        assert caught.value.offenders == (f"w ({encode.split(':')[0]})",)
        assert "store these dense or exact" in caught.value.remedy


@pytest.mark.parametrize("threads", [1, 4])
def test_overflow_names_every_tensor(threads: int, tmp_path: Path) -> None:
    base = {name: torch.zeros(20, 20) for name in "abc"}
    tuned = {"a": torch.full((20, 20), 1e5), "b": torch.ones(20, 20), "c": torch.full((20, 20), -7e4)}
    for encode in ("dense:fp16", {"a": "low_rank:1:fp16", "*": "dense:fp16"}):
        with pytest.raises(RangeError) as caught:
            wl.diff(
                base,
                tuned,
                tmp_path / "p.safetensors",
                encode=encode,
                resources=Resources(threads=threads, memory=2**31),
            )
        assert [line.split(":")[0] for line in caught.value.offenders] == ["a", "c"] and caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_delta_beyond_its_compute_dtype() -> None:
    before, after = torch.full((9, 9), 3e38), torch.full((9, 9), -3e38)
    for encode in LOSSY:
        with pytest.raises(RangeError) as caught:
            wl.diff({"w": before}, {"w": after}, encode=encode)
        assert caught.value.offenders == ("w: beyond torch.float32",)
        beside_nan = after.index_fill(0, torch.tensor([0]), NAN)
        with pytest.raises(RangeError):
            wl.diff({"w": before}, {"w": beside_nan}, encode=encode, allow_nonfinite=True)


def test_enormous_fp64_differences_are_measured() -> None:
    base = torch.zeros(4, 8, dtype=torch.float64)
    tuned = torch.full((4, 8), 1e200, dtype=torch.float64)
    tuned[0, 0] = 3e200
    patch = wl.diff({"w": base}, {"w": tuned}, encode="sparse:0.04")
    error = patch.records["w"].error
    assert error is not None and error.max_abs == 1e200
    assert error.relative_l2 == pytest.approx((31 / 40) ** 0.5, rel=1e-12)
