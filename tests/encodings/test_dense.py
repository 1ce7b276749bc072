"""`dense`: rounding, the dtype that is stored, and what does not fit it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.encodings.memory import FLOATS, LARGE, Delta, as_delta, decoded, encoded, same, sample, samples
from weightlab.encodings.dense import ENCODING, rounded
from weightlab.errors import RangeError, UsageError
from weightlab.tensors.spec import DTYPES, TensorSpec

STORED = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@settings(max_examples=150, deadline=None)
@given(samples("normal few zero equal ties tiny"))
def test_every_element_is_rounded_once(delta: Delta) -> None:
    for word, dtype in STORED.items():
        parts = encoded(f"dense:{word}", delta)
        assert same(decoded(parts, "dense", delta.compute), delta.values.to(dtype).to(delta.compute))
        assert parts.nbytes == delta.spec.numel * dtype.itemsize


@pytest.mark.parametrize("shape", LARGE)
def test_across_tiles(shape: tuple[int, ...]) -> None:
    delta = sample(shape, "F32", 1, "normal")
    assert same(decoded(encoded("dense", delta), "dense"), delta.values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_dtype_is_the_tensors_own_and_bf16_for_eight_bits(dtype: str) -> None:
    delta = as_delta(torch.tensor([1.0, 2.0]), dtype)
    assert encoded("dense", delta).parts["delta"].dtype == (
        DTYPES[dtype].torch if DTYPES[dtype].bits > 8 else torch.bfloat16
    )


def test_by_hand() -> None:
    delta = as_delta(torch.tensor([1.0, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -3.0]))
    assert encoded("dense:bf16", delta).parts["delta"].tolist() == [1.0, 1.0, 1.015625, -3.0]  # ties to even


@pytest.mark.parametrize(
    ("word", "largest", "too_large"),
    [
        ("fp16", 65519.0, 65520.0),
        ("bf16", 3.389e38, 3.3999e38),
        ("fp32", 3.4028235e38, 3.4028236e38),
    ],
)
def test_overflow_is_refused_and_names_the_tensor(word: str, largest: float, too_large: float) -> None:
    ok = as_delta(torch.tensor([0.0, -largest], dtype=torch.float64), "F64")
    assert torch.isfinite(decoded(encoded(f"dense:{word}", ok), "dense")).all()
    for beside in (0.0, float("nan"), float("inf")):
        bad = as_delta(torch.tensor([beside, -too_large], dtype=torch.float64), "F64", "layer.weight")
        with pytest.raises(RangeError) as caught:
            encoded(f"dense:{word}", bad)
        assert len(caught.value.offenders) == 1 and caught.value.offenders[0].startswith("layer.weight: reaches ")


def test_nan_and_infinity_are_no_overflow() -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    assert rounded(values, "F16", "w").tolist()[1:] == [float("inf"), float("-inf"), 1.0]


def test_parameters() -> None:
    assert ENCODING.parse([]) == {}
    assert ENCODING.parse(["bf16"]) == {"dtype": "bf16"}
    for wrong in (["float32"], ["fp32", "fp32"], [""]):
        with pytest.raises(UsageError):
            ENCODING.parse(wrong)
    assert ENCODING.accepts(TensorSpec("w", "F8_E4M3", ()), {})
