"""Patches on ordinary state dicts: a new dict, the same bits as on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from tests.ops.test_apply_out import state
from weightlab.errors import MisfitError, StackError, UsageError

ENCODINGS = ["exact", "dense", "quantized:4:log", "sparse:0.3", "low_rank:2", "sign"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("encode", ENCODINGS)
def test_the_same_bits_as_on_disk_and_the_input_is_left_alone(tmp_path: Path, encode: str, dtype: torch.dtype) -> None:
    base, tuned = state(dtype=dtype), state(1, 0.1, dtype)
    before = {n: t.clone() for n, t in base.items()}
    patch = wl.diff(base, tuned, encode=encode)
    for scale in (1.0, 0.3):
        result = wl.apply(base, scale * patch)
        assert list(result) == list(base)
        assert all(torch.equal(t, before[n]) for n, t in base.items())
        save_file(base, tmp_path / "base.safetensors")
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        wl.apply(tmp_path / "base.safetensors", scale * patch, out=tmp_path / "out.safetensors")
        on_disk = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(result[n], on_disk[n]) and result[n].dtype == on_disk[n].dtype for n in base)


def test_what_no_patch_touches_is_the_same_object_and_ties_stay(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    base = {"head": shared, "embed": shared, "other": torch.ones(2)}
    moved = shared + 1
    patch = wl.diff(base, {"head": moved, "embed": moved, "other": torch.ones(2)}, encode="dense:fp32")
    assert len(patch.records) == 1  # changed once
    result = wl.apply(base, patch)
    assert result["other"] is base["other"]
    assert result["head"] is result["embed"] and torch.equal(result["head"], moved)


def test_tensors_that_are_not_contiguous() -> None:
    whole = torch.randn(6, 8)
    base = {"turned": whole.t(), "part": whole[::2]}
    tuned = {n: t + 1 for n, t in base.items()}
    result = wl.apply(base, wl.diff(base, tuned))
    assert all(torch.equal(result[n], tuned[n]) and result[n].shape == base[n].shape for n in base)


def test_opaque_tensors_exactly_or_not_at_all() -> None:
    base = {
        "f4": torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2),
        "ints": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    tuned = {n: t.view(torch.uint8).flip(0).view(t.dtype) if t.dtype != torch.bool else ~t for n, t in base.items()}
    patch = wl.diff(base, tuned)
    result = wl.apply(base, patch)
    for name, tensor in tuned.items():
        assert result[name].shape == tensor.shape and result[name].dtype == tensor.dtype
        assert torch.equal(result[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with pytest.raises(MisfitError):
        wl.apply(base, 0.5 * patch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_numbers_stay_when_the_caller_flushes_them(dtype: torch.dtype) -> None:
    tiny = torch.tensor([1e-40, -1e-40, 1.0, 1e-39]).to(dtype)
    patch = wl.diff({"w": tiny}, {"w": tiny + torch.tensor([0.0, 0.0, 1.0, 0.0]).to(dtype)}, encode="dense")
    moved = wl.diff({"w": torch.zeros(4, dtype=dtype)}, {"w": tiny}, encode="dense")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush them")
    try:
        result = wl.apply({"w": tiny}, patch)["w"]
        twice = wl.apply({"w": tiny}, moved)["w"]
    finally:
        torch.set_flush_denormal(False)
    assert result.tolist() == [tiny[0].item(), tiny[1].item(), 2.0, tiny[3].item()] and result[0] != 0
    assert torch.equal(twice, tiny + tiny)


def test_usage() -> None:
    patch = wl.diff(state(), state(1, 0.1))
    with pytest.raises(UsageError, match="no place on disk"):
        wl.apply(state(), patch, out="x")  # type: ignore[call-overload]
    with pytest.raises(StackError):
        wl.apply(state(), [patch, patch])
    with pytest.raises(MisfitError):
        wl.apply({"other": torch.ones(2)}, patch)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in wl.__all__:
        value = getattr(wl, name)
        assert name.startswith("__") or value.__doc__, name
    assert set(wl.__all__) <= set(dir(wl))
    with pytest.raises(AttributeError, match="nowhere"):
        _ = wl.nowhere
