"""Differences in fp64 on 16-bit weights: the result is the nearest to the true sum, rounded once."""

from __future__ import annotations

import pytest
import torch

import weightlab as wl

TYPES = [(torch.bfloat16, 8), (torch.float16, 11)]


@pytest.mark.parametrize(("dtype", "digits"), TYPES)
def test_apply(dtype: torch.dtype, digits: int) -> None:
    """1 + half a step and a little more: fp32 cannot hold the little, and the half alone goes down to 1."""
    base = {"w": torch.ones(2, dtype=dtype)}
    tuned = {"w": torch.tensor([1 + 2**-digits + 2**-40, 1.0], dtype=torch.float64)}
    patch = wl.diff(base, tuned, encode="dense:fp64")
    assert wl.apply(base, patch)["w"].tolist() == [1 + 2.0 ** (1 - digits), 1.0]


@pytest.mark.parametrize("encode", ["dense:fp64", "sparse:1.0", "exact"])
def test_composed(encode: str) -> None:
    """What two patches add up to keeps what fp32 would lose: 2^-30 beside 1."""
    base = {"w": torch.zeros(4, dtype=torch.float64)}
    one = wl.diff(base, {"w": torch.full((4,), 1.0, dtype=torch.float64)}, encode=encode)
    two = wl.diff(base, {"w": torch.full((4,), 2.0**-30, dtype=torch.float64)}, encode=encode)
    both = wl.compose([one, two], base=base, encode="dense:fp64")
    assert wl.apply(base, both)["w"].tolist() == [1 + 2.0**-30] * 4


def test_composed_on_16_bit_weights() -> None:
    """Parts in fp64 on a bf16 base are summed in fp64: the two middles and a little make the next number."""
    base = {"w": torch.ones(3, dtype=torch.bfloat16)}
    half = {"w": torch.full((3,), 1 + 2.0**-8, dtype=torch.float64)}
    little = {"w": torch.full((3,), 1 + 2.0**-40, dtype=torch.float64)}
    patches = [wl.diff(base, tuned, encode="dense:fp64") for tuned in (half, little)]
    assert wl.apply(base, patches)["w"].tolist() == [1 + 2.0**-7] * 3
    assert wl.apply(base, wl.compose(patches, encode="dense:fp64"))["w"].tolist() == [1 + 2.0**-7] * 3


def test_stored_dense() -> None:
    """A delta in fp64 that is stored in bf16 is the nearest bf16, not the nearest of the nearest fp32."""
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    tuned = {"w": torch.tensor([1 + 2**-8 + 2**-40, 1.0], dtype=torch.float64)}
    assert wl.apply(base, wl.diff(base, tuned, encode="dense:bf16"))["w"].tolist() == [1 + 2.0**-7, 1.0]
