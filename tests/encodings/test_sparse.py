"""`sparse`: the largest are those that a sort finds, random ones are unbiased, places are checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.encodings.memory import LARGE, Delta, Parts, as_delta, decoded, encoded, same, sample, samples
from weightlab.encodings.dense import stored_dtype
from weightlab.encodings.sparse import ENCODING
from weightlab.errors import IntegrityError, RangeError, UsageError
from weightlab.tensors.spec import DTYPES, TensorSpec
from weightlab.tensors.tiles import TILE

BLOCK = 2**16


def test_largest_by_hand() -> None:
    parts = encoded("sparse:0.5", as_delta(torch.tensor([[3.0, -1.0, 2.0], [-2.0, 2.0, 0.0]])))
    assert parts.parts["places"].tolist() == [0, 2, 3]  # of the three equal ones the first two
    assert parts.parts["values"].tolist() == [3.0, 2.0, -2.0]
    assert parts.parts["counts"].tolist() == [3]
    assert decoded(parts, "sparse").tolist() == [3.0, 0.0, 2.0, -2.0, 0.0, 0.0]


def test_random_by_hand() -> None:
    parts = encoded("sparse:0.5:random:7", as_delta(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    found = decoded(parts, "sparse")
    assert (found != 0).sum() == 2
    assert all(value in (0.0, 2.0 * (place + 1)) for place, value in enumerate(found.tolist()))  # rescaled by 1 / 0.5


def by_sort(values: Tensor, keep: int) -> Tensor:
    order = np.argsort(-np.abs(values.numpy()), kind="stable")
    chosen = torch.from_numpy(order[:keep].copy())
    result = torch.zeros_like(values)
    result[chosen] = values[chosen]
    return result


@settings(max_examples=200, deadline=None)
@given(samples(), st.floats(1e-6, 1.0))
def test_magnitude_equals_a_sort(delta: Delta, share: float) -> None:
    assume(not delta.spec.numel or delta.values.abs().max() < DTYPES[stored_dtype(None, delta.spec)].limit)
    parts = encoded(f"sparse:{share!r}", delta)
    keep = min(delta.spec.numel, max(1, round(share * delta.spec.numel)))
    dtype = DTYPES[stored_dtype(None, delta.spec)].torch
    expected = by_sort(delta.values, keep).to(dtype).to(delta.compute)
    assert same(decoded(parts, "sparse", delta.compute) + 0.0, expected + 0.0)  # a kept -0.0 is a zero
    assert parts.numel("values") == parts.numel("places") == keep == int(parts.parts["counts"].long().sum())


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_magnitude_equals_a_sort_across_tiles(shape: tuple[int, ...], kind: str) -> None:
    delta = sample(shape, "F32", 5, kind)
    keep = round(0.3 * delta.spec.numel)
    assert same(decoded(encoded("sparse:0.3", delta), "sparse") + 0.0, by_sort(delta.values, keep) + 0.0)


def test_fp64_magnitudes_are_told_apart_beyond_fp32() -> None:
    values = torch.tensor([1.0, 1.0 + 2.0**-40, -1.0 - 2.0**-41, 1e-300, 2e-300], dtype=torch.float64)
    parts = encoded("sparse:0.4", as_delta(values, "F64"))
    assert parts.parts["places"].tolist() == [1, 2]


def test_room() -> None:
    parts = encoded("sparse:0.1", sample((500, 1000), "BF16", 0, "normal"))
    assert parts.nbytes == 50_000 * (2 + 2) + 4 * -(-500_000 // BLOCK)


def kept(seed: int, delta: Delta, share: str) -> Tensor:
    return decoded(encoded(f"sparse:{share}:random:{seed}", delta), "sparse")


def test_random_keeps_so_many_and_rescales() -> None:
    delta = as_delta(torch.ones(50, 77))
    found = kept(3, delta, "0.13")
    count = round(0.13 * 50 * 77)
    assert int((found != 0).sum()) == count
    assert torch.allclose(found[found != 0], torch.tensor(50 * 77 / count))


def test_random_is_unbiased_for_every_element() -> None:
    delta = as_delta(torch.arange(1.0, 11.0).reshape(2, 5))
    total = sum((kept(seed, delta, "0.3").double() for seed in range(2000)), torch.zeros(10, dtype=torch.float64))
    # Each element is kept in 2000 * 0.3 draws with a deviation of 20.5; six deviations are 0.205 of the mean.
    assert ((total / 2000 / delta.values.double() - 1).abs() < 0.205).all()


def test_random_is_unbiased_in_a_short_last_block() -> None:
    delta = as_delta(torch.ones(1, BLOCK + 3))
    draws = 400
    hits = sum(int((kept(seed, delta, "0.1")[BLOCK:] != 0).sum()) for seed in range(draws))
    # 120 are expected, with a deviation below 10.4 (three elements, one draw of each in ten).
    assert 60 < hits < 180


def test_random_depends_on_seed_and_name_alone() -> None:
    values = torch.ones(3, BLOCK)
    first = kept(1, as_delta(values, name="a"), "0.5")
    assert same(first, kept(1, as_delta(values, name="a"), "0.5"))
    assert not same(first, kept(2, as_delta(values, name="a"), "0.5"))
    assert not same(first, kept(1, as_delta(values, name="b"), "0.5"))
    counts = encoded("sparse:0.5:random:1", as_delta(values, name="a")).parts["counts"]
    assert counts.tolist() == [BLOCK // 2] * 3  # spread evenly over the blocks


@pytest.mark.parametrize("numel", [1, 3, 50])
def test_one_element_at_least_is_kept(numel: int) -> None:
    for written in ("sparse:0.000001", "sparse:0.000001:random"):
        assert int((decoded(encoded(written, as_delta(torch.ones(1, numel))), "sparse") != 0).sum()) == 1


def test_overflow_is_refused_and_names_the_tensor() -> None:
    for written, values, dtype in (
        ("sparse:1", [1.0, 7e4], "F16"),
        ("sparse:0.5:random", [3e38, 3e38], "F32"),
        ("sparse:0.5:random", [1.5e308, 1.5e308], "F64"),
    ):
        delta = as_delta(torch.tensor([values], dtype=torch.float64), dtype, "layer.weight")
        with pytest.raises(RangeError) as caught:
            encoded(written, delta)
        assert caught.value.offenders[0].startswith("layer.weight: ")


def test_nan_and_infinity_count_as_largest() -> None:
    values = torch.tensor([[1.0, float("nan"), float("-inf"), 5.0]])
    found = decoded(encoded("sparse:0.5", as_delta(values)), "sparse")
    assert torch.isnan(found[1]) and found.tolist()[2] == float("-inf") and found[[0, 3]].tolist() == [0.0, 0.0]


def spoiled(parts: Parts, part: str, place: int, value: int) -> Parts:
    changed = {name: tensor.clone() for name, tensor in parts.parts.items()}
    flat = changed[part].numpy().reshape(-1)
    flat[place] = value
    return Parts(parts.spec, changed, parts.parameters)


@pytest.mark.parametrize(
    ("part", "place", "value"),
    [
        ("counts", 0, 0),
        ("counts", 0, 2**32 - 1),
        ("places", 1, 0),  # not ascending
        ("places", -1, 60_000),  # beyond the end
    ],
)
def test_places_that_make_no_sense_are_refused(part: str, place: int, value: int) -> None:
    good = encoded("sparse:0.5", as_delta(torch.arange(1.0, BLOCK + 101.0).reshape(1, -1)))
    with pytest.raises(IntegrityError, match="w: its"):
        decoded(spoiled(good, part, place, value), "sparse")


def test_parts_of_unlike_length_are_refused() -> None:
    good = encoded("sparse:0.5", as_delta(torch.arange(100.0).reshape(10, 10)))
    for part in ("places", "values"):
        for cut in (good.parts[part][:-1], torch.cat([good.parts[part], good.parts[part][-1:]])):
            with pytest.raises(IntegrityError, match="disagree"):
                decoded(Parts(good.spec, {**good.parts, part: cut}, good.parameters), "sparse")


def test_parameters() -> None:
    assert ENCODING.parse(["0.1"]) == {"share": 0.1, "choice": "magnitude"}
    assert ENCODING.parse(["1", "random"]) == {"share": 1.0, "choice": "random", "seed": 0}
    assert ENCODING.parse(["1e-3", "random", "42"]) == {"share": 0.001, "choice": "random", "seed": 42}
    for wrong in (
        [],
        ["0"],
        ["1.1"],
        ["nan"],
        ["x"],
        ["0.1", "top"],
        ["0.1", "magnitude", "3"],
        ["0.1", "random", "x"],
    ):
        with pytest.raises(UsageError):
            ENCODING.parse(wrong)


def test_it_takes_matrices() -> None:
    parameters = ENCODING.parse(["0.1"])
    assert ENCODING.accepts(TensorSpec("w", "F32", (2, 2)), parameters)
    assert not ENCODING.accepts(TensorSpec("w", "F32", (100,)), parameters)
    assert not ENCODING.accepts(TensorSpec("w", "F32", ()), parameters)


def test_a_block_that_is_the_last_of_a_tile() -> None:
    values = torch.zeros(1, TILE + 1)
    values[0, TILE - 1], values[0, TILE] = 1.0, -2.0
    parts = encoded(f"sparse:{2 / (TILE + 1)!r}", as_delta(values))
    assert parts.parts["counts"].tolist() == [0] * 7 + [1, 1]
    assert same(decoded(parts, "sparse"), values.reshape(-1))
