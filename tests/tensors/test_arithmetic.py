"""The arithmetic of a tile against numpy, element by element."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from weightlab.errors import UsageError
from weightlab.tensors.arithmetic import Faults, add_terms, bits, is_finite, round_into, round_scale
from weightlab.tensors.spec import BY_TORCH, DTYPES

FLOATS = [d.torch for d in DTYPES.values() if d.kind == "float" and d.torch is not None]
SMALL = [t for t in FLOATS if t not in (torch.float64, torch.float32)]


def added(base: Tensor, terms: list[tuple[float, Tensor]], allow: bool = False) -> tuple[Tensor, Faults]:
    compute = torch.float64 if base.dtype == torch.float64 else torch.float32
    out = torch.empty_like(base)
    work, product = (torch.empty(base.numel(), dtype=compute) for _ in range(2))
    masks = [torch.empty(base.numel(), dtype=torch.bool) for _ in range(2)]
    deltas = [(scale, delta.to(compute)) for scale, delta in terms]
    before = [d.clone() for _, d in deltas]
    faults = add_terms(
        base, deltas, out, work=work, product=product, changed=masks[0], changed_too=masks[1], allow_nonfinite=allow
    )
    assert all(
        torch.equal(bits(d), bits(b)) for (_, d), b in zip(deltas, before, strict=True)
    )  # deltas are not modified
    return out, faults


def expected(base: Tensor, terms: list[tuple[float, Tensor]]) -> Tensor:
    """Separate multiplications and additions in numpy, in order, rounded once by torch."""
    wide = np.float64 if base.dtype == torch.float64 else np.float32
    total = base.double().numpy().astype(wide)
    touched = np.zeros(len(total), dtype=bool)
    for scale, delta in terms:
        values = delta.double().numpy().astype(wide)
        total = total + values * wide(scale)
        touched |= values != 0
    rounded = torch.from_numpy(total).to(base.dtype)
    return torch.where(torch.from_numpy(touched), bits(rounded), bits(base)).view(base.dtype)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(FLOATS),
    st.lists(st.sampled_from([1.0, -1.0, 0.5, 0.1, 3.7, 0.0]).map(round_scale), min_size=1, max_size=3),
    st.integers(0, 2**20),
    st.integers(1, 70),
)
def test_random_tiles(dtype: torch.dtype, scales: list[float], seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, generator=generator).to(dtype)
    base[:: max(1, count // 7)] = -0.0
    terms = []
    for scale in scales:
        delta = 0.1 * torch.randn(count, generator=generator)
        delta[torch.rand(count, generator=generator) < 0.4] = 0.0
        terms.append((scale, delta))
    out, faults = added(base, terms)
    assert torch.equal(bits(out), bits(expected(base, terms)))
    assert not (faults.input_nonfinite or faults.delta_nonfinite or faults.overflow)


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_zero_is_kept_where_nothing_is_added(dtype: torch.dtype) -> None:
    base = torch.tensor([-0.0, -0.0, 1.0]).to(dtype)
    out, _ = added(base, [(1.0, torch.tensor([0.0, -0.0, 0.0])), (2.0, torch.zeros(3))])
    assert torch.equal(bits(out), bits(base))
    out, _ = added(base, [(1.0, torch.tensor([1.0, 0.0, 0.0]))])
    assert out.float().tolist() == [1.0, 0.0, 1.0] and torch.equal(bits(out)[1:], bits(base)[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_payload_of_a_nan_stays_where_nothing_is_added(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
    canonical = {2: 0x7E00 if dtype == torch.float16 else 0x7FC0, 4: 0x7FC00000, 8: 0x7FF8000000000000}
    payload = canonical[base.element_size()] + 5
    bits(base)[0] = payload
    _, faults = added(base, [(1.0, torch.tensor([0.0, 1.0, 0.0]))])
    assert faults.input_nonfinite
    out, faults = added(base, [(1.0, torch.tensor([0.0, 1.0, 0.0]))], allow=True)
    assert bits(out)[0] == payload and out[1:].tolist() == [3.0, 3.0] and not faults.overflow
    out, _ = added(base, [(1.0, torch.ones(3))], allow=True)
    assert int(bits(out)[0]) == canonical[base.element_size()]


@pytest.mark.parametrize("dtype", SMALL)
def test_the_limit_of_each_dtype_exactly(dtype: torch.dtype) -> None:
    """The smallest sum that no longer rounds to a finite value is reported, the one before it is stored."""
    limit = BY_TORCH[dtype].limit
    just_below = float(np.nextafter(np.float32(limit), np.float32(0)))
    zero = torch.zeros(2).to(dtype)
    out, faults = added(zero, [(1.0, torch.tensor([just_below, -just_below]))])
    assert not faults.overflow and out.float().abs().tolist() == [float(torch.finfo(dtype).max)] * 2
    for value in (limit, -limit, *([2 * limit] if limit < 1e38 else [])):
        _, faults = added(zero, [(1.0, torch.tensor([0.0, value]))])
        assert faults.overflow and not faults.input_nonfinite


def test_overflow_is_found_beside_nan_that_is_allowed() -> None:
    base = torch.tensor([float("nan"), 60000.0, float("inf")]).half()
    _, faults = added(base, [(1.0, torch.tensor([1.0, 10000.0, 1.0]))], allow=True)
    assert faults.overflow
    _, faults = added(base, [(1.0, torch.tensor([1.0, 1.0, 1.0]))], allow=True)
    assert not faults.overflow
    _, faults = added(torch.ones(1), [(1.0, torch.tensor([float("inf")]))])
    assert faults.delta_nonfinite and not faults.input_nonfinite
    out, faults = added(torch.ones(1), [(1.0, torch.tensor([float("inf")]))], allow=True)
    assert out.tolist() == [float("inf")] and not faults.overflow


def test_the_order_of_terms_is_kept_and_sums_are_rounded_once() -> None:
    big, small = torch.tensor([2.0**24]), torch.tensor([1.0])
    out, _ = added(torch.zeros(1), [(1.0, big), (1.0, small), (-1.0, big)])
    assert out.item() == 0.0  # in fp32 the one is lost; in another order it is not
    out, _ = added(torch.zeros(1), [(1.0, big), (-1.0, big), (1.0, small)])
    assert out.item() == 1.0
    halves = torch.full((1,), 2.0**-9)
    out, _ = added(torch.ones(1).bfloat16(), [(1.0, halves), (1.0, halves)])
    assert out.item() == 1.0 and out.dtype == torch.bfloat16
    out, _ = added(torch.ones(1).bfloat16(), [(1.0, 2 * halves), (1.0, 2 * halves)])
    assert out.item() == 1 + 2.0**-7  # rounded after each, it would be 1


def test_scales() -> None:
    assert round_scale(0.1) == float(np.float32(0.1)) != 0.1
    assert round_scale(-2) == -2.0
    for wrong in (float("nan"), float("inf"), 1e39, -1e39):
        with pytest.raises(UsageError, match="no scale"):
            round_scale(wrong)


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_finite(dtype: torch.dtype) -> None:
    values = torch.zeros(100).to(dtype)
    assert is_finite(values)
    nan = torch.tensor([float("nan")]).to(dtype)
    values[57:58] = nan
    assert not is_finite(values)


@cache
def finite_values(dtype: torch.dtype) -> list[float]:
    """All finite elements of a dtype, in order."""
    every = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    held = (every.to(torch.uint8) if dtype.itemsize == 1 else every.to(torch.int16)).view(dtype).double()
    return sorted({float(v) for v in held[torch.isfinite(held)]})


def nearest(value: Fraction, dtype: torch.dtype) -> set[float]:
    """The elements of a dtype that are nearest to a value."""
    place = bisect_left(finite_values(dtype), float(value))
    around = finite_values(dtype)[max(0, place - 2) : place + 2]
    least = min(abs(Fraction(v) - value) for v in around)
    return {v for v in around if abs(Fraction(v) - value) == least}


@pytest.mark.parametrize("dtype", SMALL)
def test_fp64_is_rounded_once(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(7)
    middles = [1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), torch.finfo(dtype).tiny * (1 + step / 2)]
    values = [m * (1 + k * 2.0**-40) for m in middles for k in (-1, 0, 1)]
    values += torch.randn(200, generator=generator, dtype=torch.float64).tolist()
    out = torch.empty(len(values), dtype=dtype)
    round_into(out, torch.tensor(values, dtype=torch.float64))
    for value, got in zip(values, out.double().tolist(), strict=True):
        best = nearest(Fraction(value), dtype)
        assert got in best, value
        if len(best) == 2:  # a middle: to the even one
            pattern = int(bits(torch.tensor([got], dtype=torch.float64).to(dtype))[0])
            assert pattern % 2 == 0, value


def test_rounding_keeps_what_is_special() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e300, -1e-300], dtype=torch.float64)
    out = torch.empty(6, dtype=torch.bfloat16)
    round_into(out, values)
    assert bool(out[0].isnan()) and out[1:3].tolist() == [float("inf"), -float("inf")]
    assert torch.equal(bits(out)[3:4], bits(torch.tensor([-0.0], dtype=torch.bfloat16)))
    assert float(out[5]) == 0.0
