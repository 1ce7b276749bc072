"""`quantized`: codes by hand, packing, and how far from the truth they may be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.encodings.memory import LARGE, Delta, as_delta, decoded, encoded, sample, samples
from weightlab.encodings._packing import pack, packed_bytes, unpack
from weightlab.encodings.quantized import ENCODING
from weightlab.errors import IntegrityError, NonFiniteError, RangeError, UsageError
from weightlab.tensors.spec import TensorSpec

LEVELS = ["linear", "log", "tanh"]
SCOPES = ["tensor", "channel"]


def test_linear_by_hand() -> None:
    delta = as_delta(torch.tensor([[-1.0, 0.0, 1.0, 2.0], [2.0, 1.4, 0.6, -0.4]]))
    parts = encoded("quantized:2", delta)
    assert parts.parts["step"].tolist() == [1.0]  # (2 - -1) / 3
    assert parts.parts["zero"].tolist() == [1]
    codes = [0, 1, 2, 3, 3, 2, 2, 1]
    assert parts.parts["codes"].tolist() == [
        sum(code << 2 * place for place, code in enumerate(half)) for half in (codes[:4], codes[4:])
    ]
    assert decoded(parts, "quantized").tolist() == [-1.0, 0.0, 1.0, 2.0, 2.0, 1.0, 1.0, 0.0]


def test_linear_by_channel_by_hand() -> None:
    parts = encoded("quantized:2:channel", as_delta(torch.tensor([[0.0, 3.0], [-6.0, 0.0], [0.0, 0.0]])))
    assert parts.parts["step"].tolist() == [1.0, 2.0, 0.0]
    assert parts.parts["zero"].tolist() == [0, 3, 0]
    assert decoded(parts, "quantized").tolist() == [0.0, 3.0, -6.0, 0.0, 0.0, 0.0]


def test_log_by_hand() -> None:
    # 3 bits: 7 levels, the positive ones 2**(-4 * (3 - i) / 3) of the largest: 0.1575, 0.3969, 1.
    parts = encoded("quantized:3:log", as_delta(torch.tensor([8.0, -8.0, 0.0, 3.2, -1.3, 0.6, -0.7, 5.7])))
    book = [2 ** (-8 / 3), 2 ** (-4 / 3), 1.0]
    assert parts.parts["scale"].tolist() == [8.0]
    assert np.allclose(parts.parts["book"], [-1, -book[1], -book[0], 0, *book], rtol=1e-7)
    levels = parts.parts["book"] * 8
    expected = [levels[code] for code in (6, 0, 3, 5, 2, 3, 2, 6)]  # 0.6 is nearer 0, 0.7 nearer 1.26; 5.7 nearer 8
    assert decoded(parts, "quantized").tolist() == expected


def test_tanh_by_hand() -> None:
    # The largest is 1, so level i is atanh(tanh(1) * i / 3): 0.2595, 0.5597, 1.
    parts = encoded("quantized:3:tanh", as_delta(torch.tensor([1.0, -1.0, 0.0, 0.5, -0.25, 0.1, 0.14, 0.75])))
    unit = [math.atanh(math.tanh(1) * i / 3) for i in (1, 2, 3)]
    assert np.allclose(parts.parts["book"], [-u for u in unit[::-1]] + [0] + unit, rtol=1e-6)
    expected = [parts.parts["book"][code] for code in (6, 0, 3, 5, 2, 3, 4, 5)]
    assert decoded(parts, "quantized").tolist() == expected


@settings(max_examples=100, deadline=None)
@given(samples("normal few zero equal ties wide"), st.integers(2, 8), st.sampled_from(SCOPES))
def test_linear_is_within_one_step(delta: Delta, bits: int, scope: str) -> None:
    parts = encoded(f"quantized:{bits}:linear:{scope}", delta)
    found = decoded(parts, "quantized", delta.compute)
    if not delta.spec.numel:
        return
    matrix = delta.values.double().reshape(delta.spec.rows if scope == "channel" else 1, -1)
    span = matrix.amax(1).clamp_min(0) - matrix.amin(1).clamp_max(0)
    step = span / (2**bits - 1)
    error = (found.double().reshape(matrix.shape) - matrix).abs().amax(1)
    # Half a step, and half a step more where the range is shifted so that zero is a level.
    assert (error <= step * 1.0001 + 1e-44).all()
    assert (found[delta.values == 0] == 0).all()


@settings(max_examples=100, deadline=None)
@given(samples("normal few zero equal ties wide"), st.integers(2, 8), st.sampled_from(SCOPES))
@pytest.mark.parametrize("levels", ["log", "tanh"])
def test_books_give_the_nearest_level(levels: str, delta: Delta, bits: int, scope: str) -> None:
    parts = encoded(f"quantized:{bits}:{levels}:{scope}", delta)
    found = decoded(parts, "quantized", delta.compute).double()
    assert parts.parts["book"].dtype == torch.float32 and len(parts.parts["book"]) == 2**bits - 1
    if not delta.spec.numel:
        return
    scale = parts.parts["scale"].double()
    matrix = delta.values.double().reshape(len(scale), -1)
    all_levels = scale[:, None] * parts.parts["book"].double()
    nearest = (matrix[:, :, None] - all_levels[:, None, :]).abs().amin(2)
    error = (found.reshape(matrix.shape) - matrix).abs()
    assert (error <= nearest + scale[:, None] * 1e-6 + 1e-44).all()
    assert (found[delta.values == 0] == 0).all()
    assert (matrix.abs().amax(1) - scale).abs().max() <= scale.max() * 1e-7


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("scope", SCOPES)
def test_across_tiles(shape: tuple[int, ...], scope: str) -> None:
    delta = sample(shape, "F32", 3, "normal")
    parts = encoded(f"quantized:8:{scope}", delta)
    assert (decoded(parts, "quantized") - delta.values).abs().max() < 0.03
    rows = delta.spec.rows if scope == "channel" else 1
    assert parts.nbytes == packed_bytes(delta.spec.numel, 8) + 5 * rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_really_packed(bits: int) -> None:
    delta = sample((256, 100), "F32", 0, "normal")
    assert encoded(f"quantized:{bits}", delta).nbytes == 256 * 100 * bits // 8 + 5
    assert encoded(f"quantized:{bits}:log", delta).nbytes == 256 * 100 * bits // 8 + 4 + 4 * (2**bits - 1)


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
def test_packing(bits: int, codes: list[int]) -> None:
    values = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    packed = pack(values, bits)
    assert len(packed) == packed_bytes(len(values), bits)
    assert torch.equal(unpack(packed, bits, len(values)), values)
    as_number = int.from_bytes(packed.numpy().tobytes(), "little")
    assert as_number == sum(int(code) << bits * place for place, code in enumerate(values))


@pytest.mark.parametrize(("levels", "scope"), [*itertools.product(LEVELS, SCOPES)])
def test_nan_infinity_and_too_large_are_refused(levels: str, scope: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = as_delta(torch.tensor([[1.0, 2.0], [value, 0.0]]), "F32", "layer.weight")
        with pytest.raises(NonFiniteError) as caught:
            encoded(f"quantized:4:{levels}:{scope}", bad)
        assert caught.value.offenders == ("layer.weight (quantized)",)
    far = as_delta(torch.tensor([[1.0, 1e39]], dtype=torch.float64), "F64", "layer.weight")
    with pytest.raises(RangeError) as far_caught:
        encoded(f"quantized:4:{levels}:{scope}", far)
    assert far_caught.value.offenders[0].startswith("layer.weight: ")


def test_outermost_levels_stay_in_range() -> None:
    full = as_delta(torch.tensor([-3.4e38, 3.4e38, 1e38]))
    with pytest.raises(RangeError):
        encoded("quantized:2", full)
    assert torch.isfinite(decoded(encoded("quantized:2:log", full), "quantized")).all()


def test_a_code_outside_its_book_is_refused() -> None:
    parts = encoded("quantized:3:log", as_delta(torch.arange(8.0)))
    parts.parts["codes"] = torch.full_like(parts.parts["codes"], 255)
    with pytest.raises(IntegrityError, match="outside its code book"):
        decoded(parts, "quantized")


def test_parameters() -> None:
    assert ENCODING.parse(["4"]) == {"bits": 4, "levels": "linear", "scope": "tensor"}
    assert ENCODING.parse(["3", "channel", "log"]) == {"bits": 3, "levels": "log", "scope": "channel"}
    for wrong in ([], ["1"], ["9"], ["x"], ["4", "cubic"], ["4", "log", "tanh"], ["4", "tensor", "channel"], ["-4"]):
        with pytest.raises(UsageError):
            ENCODING.parse(wrong)


@pytest.mark.parametrize("parameters", [{}, {"bits": 4}, {"bits": 9, "levels": "log", "scope": "tensor"}])
def test_a_header_that_makes_no_sense_is_refused(parameters: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        ENCODING.expected(TensorSpec("w", "F32", (4, 4)), parameters)


@pytest.mark.parametrize(
    ("shape", "dtype", "words", "takes"),
    [
        ((100, 100), "F32", ["8"], True),
        ((3,), "F32", ["4"], True),  # 4 bytes of codes and 5 of range, dense has 12
        ((2,), "F32", ["4"], False),
        ((255,), "F32", ["8", "log"], False),  # a code book of 1,020 bytes
        ((1000, 2), "BF16", ["4", "channel"], False),  # 5 bytes a row beside 4 of dense
        ((), "F64", ["2"], True),
        ((0, 3), "F32", ["4"], False),
    ],
)
def test_it_takes_what_becomes_smaller_than_dense(
    shape: tuple[int, ...], dtype: str, words: list[str], takes: bool
) -> None:
    assert ENCODING.accepts(TensorSpec("w", dtype, shape), ENCODING.parse(words)) is takes
