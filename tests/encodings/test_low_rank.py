"""`low_rank`: factors of matrices whose decomposition is known, and decoding that is the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.encodings.memory import LARGE, Delta, Parts, as_delta, decoded, encoded, same, sample
from weightlab.encodings.low_rank import ENCODING, factorise
from weightlab.errors import NonFiniteError, RangeError, UsageError
from weightlab.tensors.spec import TensorSpec


def test_rank_one_by_hand() -> None:
    column, row = torch.tensor([[3.0], [0.0], [4.0]]), torch.tensor([[1.0, -2.0, 2.0, 0.0]])  # norms 5 and 3
    parts = encoded("low_rank:1", as_delta(column @ row))
    left, right = parts.parts["left"], parts.parts["right"]
    assert left.shape == (3, 1) and right.shape == (1, 4)
    assert torch.allclose(left.abs(), column.abs() * 3, atol=1e-5)
    assert torch.allclose(right.abs(), row.abs() / 3, atol=1e-6)
    assert torch.allclose(decoded(parts, "low_rank").reshape(3, 4), column @ row, atol=1e-5)


def test_the_largest_singular_values_are_kept() -> None:
    matrix = torch.zeros(6, 6)
    matrix[range(4), range(4)] = torch.tensor([1.0, -4.0, 2.0, 3.0])
    parts = encoded("low_rank:2", as_delta(matrix))
    assert torch.allclose(decoded(parts, "low_rank").reshape(6, 6).diagonal(), torch.tensor([0.0, -4, 0, 3, 0, 0]))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.53, 1), (0.54, 2), (0.83, 2), (0.84, 3), (1.0, 4)])
def test_energy_by_hand(energy: float, rank: int) -> None:
    # Squares 16, 9, 4, 1 of 30 in all: shares 0.533, 0.833, 0.967, 1.
    matrix = torch.zeros(40, 40)
    matrix[range(4), range(4)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert encoded(f"low_rank:energy:{energy}", as_delta(matrix)).parameters == {"rank": rank}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 30), st.integers(2, 30), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1, 1e-18, 1e19])
)
def test_no_other_matrix_of_the_rank_is_nearer(rows: int, columns: int, rank: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * size
    left, right = factorise(matrix, rank, None)
    singular = torch.linalg.svdvals(matrix.double())
    best = (singular[rank:] ** 2).sum().sqrt()
    assert left.shape[1] == min(rank, rows, columns)
    assert (left @ right - matrix.double()).norm() <= best * (1 + 1e-6) + singular[0] * 1e-6


def test_randomised_decomposition_of_a_large_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1100, 8, generator=generator) @ torch.randn(8, 1300, generator=generator)
    noisy = known + 0.01 * torch.randn(known.shape, generator=generator)
    before = torch.random.get_rng_state()
    left, right = factorise(noisy, 8, None)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers are used
    singular = torch.linalg.svdvals(noisy)
    assert (left @ right - noisy).norm() <= (singular[8:] ** 2).sum().sqrt() * 1.01
    again = factorise(noisy, 8, None)
    assert same(left, again[0]) and same(right, again[1])


def naive(left: Tensor, right: Tensor) -> Tensor:
    """Rank by rank, ascending, multiply and add separately."""
    total = torch.zeros(left.shape[0], right.shape[1])
    for k in range(left.shape[1]):
        total = total + left[:, k, None] * right[k, None, :]
    return total


@pytest.mark.parametrize("shape", [(5, 7), (64, 3, 3, 3), *LARGE[1:]])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_decoding_adds_rank_by_rank(shape: tuple[int, ...], dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    spec = TensorSpec("w", "F32", shape)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    left = torch.randn(spec.rows, 3, generator=generator).to(kind)
    right = torch.randn(3, spec.columns, generator=generator).to(kind)
    parts = Parts(spec, {"left": left, "right": right}, {"rank": 3})
    assert same(decoded(parts, "low_rank"), naive(left.float(), right.float()).reshape(-1))


@pytest.mark.parametrize("shape", [(40, 40), (40, 3, 3, 3), (4, 150_000)])
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3"])
def test_a_convolution_is_a_matrix_of_output_channels(shape: tuple[int, ...], dtype: str) -> None:
    delta = sample(shape, dtype, 0, "normal")
    parts = encoded("low_rank:1", delta)
    matrix = delta.values.reshape(shape[0], -1).double()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best = s[0] * u[:, :1] @ vt[:1]
    assert (decoded(parts, "low_rank", delta.compute).reshape(matrix.shape).double() - best).norm() < 1e-6 * s[0]


def test_sums_over_long_rows_are_right() -> None:
    """In fp32, decomposing three rows of half a million ones gives 2.5 for the first of them."""
    for shape in ((3, 2**19), (2**19, 3)):
        found = decoded(encoded("low_rank:1", as_delta(torch.ones(shape))), "low_rank")
        assert (found - 1).abs().max() < 1e-6


def test_a_matrix_of_zeros() -> None:
    parts = encoded("low_rank:2", as_delta(torch.zeros(9, 9)))
    assert not decoded(parts, "low_rank").any()
    assert not decoded(encoded("low_rank:energy:0.9", as_delta(torch.zeros(9, 9))), "low_rank").any()


def test_factors_may_be_stored_in_half_the_room() -> None:
    delta = sample((64, 96), "F32", 0, "normal")
    assert encoded("low_rank:4", delta).nbytes == 4 * (64 + 96) * 4
    assert encoded("low_rank:4:bf16", delta).nbytes == 4 * (64 + 96) * 2
    assert encoded("low_rank:energy:0.5:fp16", delta).parts["left"].dtype == torch.float16


def test_nan_infinity_and_too_large_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        bad = as_delta(torch.full((30, 30), value), name="layer.weight")
        with pytest.raises(NonFiniteError) as caught:
            encoded("low_rank:1", bad)
        assert caught.value.offenders == ("layer.weight (low_rank)",)
    large = as_delta(torch.full((30, 30), 1e5), name="layer.weight")
    with pytest.raises(RangeError) as too_large:
        encoded("low_rank:1:fp16", large)
    assert too_large.value.offenders[0].startswith("layer.weight: ")
    largest = as_delta(torch.full((30, 30), 3e38), name="layer.weight")
    with pytest.raises(RangeError):
        encoded("low_rank:1", largest)  # its singular value is thirty times that


def test_what_it_cannot_make_smaller_it_leaves_to_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    noise: Delta = as_delta(torch.randn(20, 20, generator=generator))
    assert ENCODING.prepare(noise, ENCODING.parse(["energy", "0.99"]), Parts(noise.spec, {}, {})) is None
    takes = {
        (100, 100): True,
        (100,): False,
        (): False,
        (0, 5): False,
        (8, 8): False,  # 4 * 16 = 64 elements
        (9, 9): True,
    }
    for shape, expected in takes.items():
        assert ENCODING.accepts(TensorSpec("w", "F32", shape), ENCODING.parse(["4"])) is expected
    # Of 16 bits an element against 32 in the factors: twice the elements are needed.
    assert not ENCODING.accepts(TensorSpec("w", "BF16", (12, 12)), ENCODING.parse(["4"]))
    assert ENCODING.accepts(TensorSpec("w", "BF16", (12, 12)), ENCODING.parse(["4", "bf16"]))


def test_parameters() -> None:
    assert ENCODING.parse(["16"]) == {"rank": 16}
    assert ENCODING.parse(["16", "bf16"]) == {"rank": 16, "dtype": "bf16"}
    assert ENCODING.parse(["energy", "0.9", "fp16"]) == {"energy": 0.9, "dtype": "fp16"}
    for wrong in (
        [],
        ["0"],
        ["-1"],
        ["x"],
        ["energy"],
        ["energy", "0"],
        ["energy", "1.1"],
        ["4", "int8"],
        ["4", "bf16", "x"],
    ):
        with pytest.raises(UsageError):
            ENCODING.parse(wrong)


@pytest.mark.parametrize("rank", [0, -1, 1.0, "1", None, True])
def test_a_rank_that_makes_no_sense_is_refused(rank: object) -> None:
    with pytest.raises(ValueError):
        ENCODING.expected(TensorSpec("w", "F32", (4, 4)), {"rank": rank})
