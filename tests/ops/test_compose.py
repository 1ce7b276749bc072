"""Patches into one: sums by hand, exact ones with their base, the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from tests.ops.test_apply_out import state
from weightlab.errors import MisfitError, NamesMismatchError, UsageError, WrongBaseError

State = dict[str, Tensor]
BASE: State = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]]), "c": torch.tensor([8.0])}


def patch(change: dict[str, list[float]], encode: str = "dense:fp32") -> wl.Patch:
    """The patch that adds these numbers to the base."""
    tuned = {n: t + torch.tensor(change.get(n, 0.0)).reshape(-1 if t.ndim == 1 else (1, 1)) for n, t in BASE.items()}
    return wl.diff(BASE, tuned, encode=encode)


def test_sums_scales_and_negation_by_hand() -> None:
    one, two = patch({"a": [1.0, 0.0], "b": [2.0]}), patch({"a": [0.5, 4.0], "c": [-1.0]})
    both = wl.compose([one * 2, -two])
    assert set(both.records) == {"a", "b", "c"} and both.header.kind == "composed"
    result = wl.apply(BASE, both)
    assert (
        result["a"].tolist() == [1 + 2 - 0.5, 2 + 0 - 4]
        and result["b"].tolist() == [[8.0]]
        and result["c"].tolist() == [9.0]
    )
    half = wl.apply(BASE, 0.5 * both)
    assert half["a"].tolist() == [1 + 0.75, 2 - 2]
    assert {p["scale"] for p in both.header.method.parameters["patches"]} == {2.0, -1.0}


def test_the_order_of_patches_does_not_matter(tmp_path: Path) -> None:
    one, two = patch({"a": [0.1, 0.2]}), patch({"a": [0.3, 0.7]})
    found = [wl.compose(p, tmp_path / f"{i}.safetensors") for i, p in enumerate(([one, two], [two, one]))]
    assert found[0].id == found[1].id
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_encodings_of_all_kinds_and_the_error_is_told() -> None:
    one = wl.diff(state(), state(1, 0.1), encode="quantized:8")
    two = wl.diff(state(), state(2, 0.1), encode="low_rank:3")
    whole = wl.apply(wl.apply(state(), one), two)
    both = wl.apply(state(), wl.compose([one, two]))
    assert all(torch.allclose(both[n], whole[n], atol=1e-5) for n in whole)
    small = wl.compose([one, two], encode="quantized:4")
    errors = [r.error.relative_l2 for r in small.records.values() if r.error]
    assert len(errors) == 4 and all(0 < e < 0.2 for e in errors)


def test_exact_patches_need_their_base(tmp_path: Path) -> None:
    base, one, two = state(), state(1, 0.1), state(2, 0.1)
    first, second = wl.diff(base, one), wl.diff(base, two)
    with pytest.raises(UsageError, match="base only"):
        wl.compose([first, second])
    with pytest.raises(WrongBaseError):
        wl.compose([first, second], base=one)
    both = wl.compose([first, 0.5 * second], base=base)
    assert all(r.encoding == "exact" for r in both.records.values())
    expected = wl.apply(base, [first, 0.5 * second])
    result = wl.apply(base, both)
    assert all(torch.equal(result[n], expected[n]) for n in base)
    as_numbers = wl.apply(base, wl.compose([first, 0.5 * second], base=base, encode="dense:fp32"))
    assert all(torch.allclose(as_numbers[n], expected[n], atol=1e-6) for n in base)
    mixed = wl.compose([first, wl.diff(base, two, encode="dense:fp32")], base=base)
    assert all(r.encoding == "dense" for r in mixed.records.values())


def test_the_way_back_swaps_the_digests_and_gives_the_first_bytes(tmp_path: Path) -> None:
    base, tuned = state(dtype=torch.bfloat16), state(1, 0.1, torch.bfloat16)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    there = wl.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    back = wl.compose(-there, tmp_path / "back.safetensors", base=tmp_path / "base.safetensors")
    for name, record in there.records.items():
        assert (back.records[name].base_digest, back.records[name].result_digest) == (
            record.result_digest,
            record.base_digest,
        )
    assert there.header.result is not None and back.header.result is not None
    assert back.header.base.fingerprint == there.header.result.fingerprint
    assert back.header.result.fingerprint == there.header.base.fingerprint
    wl.apply(tmp_path / "tuned.safetensors", back, out=tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[n], t) for n, t in base.items())
    with pytest.raises(WrongBaseError):
        wl.apply(base, back)


def test_what_cannot_be_composed_is_all_listed() -> None:
    one, two = patch({"a": [1.0, 0.0]}), patch({"a": [2.0, 1.0]})
    with pytest.raises(UsageError, match="given twice"):
        wl.compose([one, 0.5 * one])
    with pytest.raises(UsageError, match="nothing to compose"):
        wl.compose([])
    other = wl.diff(
        {"a": torch.zeros(3), "b": torch.zeros(2, 2)}, {"a": torch.ones(3), "b": torch.ones(2, 2)}, encode="dense"
    )
    with pytest.raises(NamesMismatchError) as shapes:
        wl.compose([patch({"a": [1.0, 1.0], "b": [1.0]}), other])
    assert [o.split(":")[0] for o in shapes.value.offenders] == ["a", "b"]
    assert set(wl.compose([one, other], exclude="a").records) == {"b"}
    grown = wl.diff(BASE, BASE | {"new": torch.ones(2), "b": torch.ones(2, 1)}, encode="dense", allow=["added", "rows"])
    with pytest.raises(MisfitError) as undefined:
        wl.compose([two, grown], base=BASE)
    assert [o.split(":")[0] for o in undefined.value.offenders] == ["b", "new"]
    assert set(wl.compose([two, grown], base=BASE, include=["a"]).records) == {"a"}


def test_a_sum_of_nothing_left_is_an_empty_patch() -> None:
    one = patch({"a": [1.0, 0.0]})
    zero = wl.compose([one, wl.compose([-one])])
    assert not zero.records
    assert all(torch.equal(t, BASE[n]) for n, t in wl.apply(BASE, zero).items())


def test_the_base_is_told_where_all_patches_have_one() -> None:
    """Composed as differences, without the base: patches of one base are for it, those of two for none."""
    base, other = {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}
    first, second = (wl.diff(base, {"w": torch.full((2, 2), v)}, encode="dense") for v in (2.0, 3.0))
    foreign = wl.diff(other, {"w": torch.full((2, 2), 5.0)}, encode="dense")
    assert first.header.base.fingerprint is not None
    assert wl.compose([first, second], encode="dense").header.base.fingerprint == first.header.base.fingerprint
    assert wl.compose([first, foreign], encode="dense").header.base.fingerprint is None
