"""`sign`: bits and scales by hand, and that the scale is the best one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.encodings.memory import LARGE, Delta, as_delta, decoded, encoded, sample, samples
from weightlab.encodings.sign import ENCODING
from weightlab.errors import NonFiniteError, RangeError, UsageError
from weightlab.tensors.spec import TensorSpec


def test_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0, 3.0, -4.0, 0.0, -0.0, -1.0, 5.0], [-1.0] * 8, [0.0] * 8])
    parts = encoded("sign", as_delta(rows))
    assert parts.parts["scale"].tolist() == [2.0, 1.0, 0.0]
    assert parts.parts["signs"].tolist() == [0b01001010, 0b11111111, 0]
    found = decoded(parts, "sign").reshape(3, 8)
    assert found.tolist() == [[2.0, -2.0, 2.0, -2.0, 2.0, 2.0, -2.0, 2.0], [-1.0] * 8, [0.0] * 8]


@settings(max_examples=150, deadline=None)
@given(samples("normal few zero equal ties wide"))
def test_every_element_becomes_its_sign_times_the_mean_of_its_row(delta: Delta) -> None:
    parts = encoded("sign", delta)
    if not delta.spec.numel:
        assert parts.numel("signs") == 0
        return
    matrix = delta.values.double().reshape(delta.spec.rows, delta.spec.columns)
    expected = torch.where(matrix < 0, -1.0, 1.0) * matrix.abs().mean(1, keepdim=True)
    found = decoded(parts, "sign", delta.compute).double().reshape(matrix.shape)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-44)
    assert parts.nbytes == -(-delta.spec.numel // 8) + 4 * delta.spec.rows


def test_no_other_scale_is_nearer() -> None:
    delta = sample((20, 30), "F32", 2, "normal")
    matrix = delta.values.reshape(20, 30)
    found = decoded(encoded("sign", delta), "sign").reshape(20, 30)
    least = (found - matrix).norm(dim=1)
    for factor in (0.99, 1.01):
        assert ((found * factor - matrix).norm(dim=1) > least).all()


@pytest.mark.parametrize("shape", LARGE)
def test_across_tiles(shape: tuple[int, ...]) -> None:
    delta = sample(shape, "F32", 3, "normal")
    found = decoded(encoded("sign", delta), "sign").reshape(delta.spec.rows, -1)
    with delta.matrix() as matrix:
        assert torch.equal(found < 0, matrix < 0)
    assert torch.allclose(found.abs(), matrix.abs().double().mean(1, keepdim=True).float().expand_as(found))


def test_nan_infinity_and_too_large_are_refused() -> None:
    for value in (float("nan"), float("-inf")):
        values = torch.ones(3, 8)
        values[1, 2] = value
        with pytest.raises(NonFiniteError) as caught:
            encoded("sign", as_delta(values, name="layer.weight"))
        assert caught.value.offenders == ("layer.weight (sign)",)
    with pytest.raises(RangeError) as too_large:
        encoded("sign", as_delta(torch.full((1, 8), 1e39, dtype=torch.float64), "F64", "layer.weight"))
    assert too_large.value.offenders[0].startswith("layer.weight: ")


def test_it_takes_matrices_of_some_width() -> None:
    takes = {(2, 8): True, (2, 7): False, (64,): False, (): False, (4, 1, 3, 3): True}
    assert {shape: ENCODING.accepts(TensorSpec("w", "F32", shape), {}) for shape in takes} == takes


def test_parameters() -> None:
    assert ENCODING.parse([]) == {}
    with pytest.raises(UsageError):
        ENCODING.parse(["2"])
