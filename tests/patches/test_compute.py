"""A tile of a patched tensor: what is added to what, what is refused, and that every offender is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor

import weightlab as wl
from tests.patches.tools import changed, make, state
from weightlab.errors import IntegrityError, NonFiniteError, RangeError, WrongBaseError
from weightlab.patches.compute import Offences, check_bases, compute_tile, digest_tensors, read_clean
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patch import Patch, open_patch
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources
from weightlab.tensors.tiles import TILE, tiles
from weightlab.tensors.workspace import Workspace


def delta_of(change: dict[str, Tensor], encode: str = "dense:fp32") -> Patch:
    """A patch with exactly these deltas."""
    return wl.diff({n: torch.zeros_like(t) for n, t in change.items()}, change, encode=encode)


def test_a_sum_by_hand() -> None:
    base = {"w": torch.tensor([1.0, 2.0, 3.0, -0.0])}
    first, second = (delta_of({"w": torch.tensor(v)}) for v in ([1.0, 0.0, 4.0, 0.0], [0.5, 0.0, -7.0, 0.0]))
    assert wl.apply(base, [first, second])["w"].tolist() == [2.5, 2.0, 0.0, 0.0]
    assert wl.apply(base, [0.5 * first, -second])["w"].tolist() == [1.0, 2.0, 12.0, 0.0]
    assert str(wl.apply(base, [first, second])["w"][3]) == "tensor(-0.)"  # untouched, to the bit


def test_one_rounding_in_narrow_dtypes() -> None:
    base = {"w": torch.tensor([1.0]).to(torch.bfloat16)}
    small = [delta_of({"w": torch.tensor([2.0**-9 * (1 + i / 8)])}) for i in range(3)]
    # Each alone is under half a unit in the last place of 1 (2**-7); the sum of all three is over.
    assert all(wl.apply(base, p)["w"].item() == 1.0 for p in small)
    assert wl.apply(base, small)["w"].item() == 1.0 + 2.0**-7


def test_the_order_of_patches_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = [delta_of({"w": torch.randn(1000, generator=generator)}) for _ in range(4)]
    base = {"w": torch.randn(1000, generator=generator)}
    expected = wl.apply(base, patches)["w"]
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        assert torch.equal(wl.apply(base, [patches[i] for i in order])["w"], expected)


def test_scale_zero_leaves_every_bit() -> None:
    nan = torch.tensor([0x7F812345, 0x80000000, 0x3F800000], dtype=torch.int64).to(torch.uint32).view(torch.float32)
    patch = delta_of({"w": torch.ones(3)})
    assert torch.equal(wl.apply({"w": nan}, patch.at(0.0))["w"].view(torch.int32), nan.view(torch.int32))


def test_overflow_names_every_tensor() -> None:
    base = {name: torch.full((4,), 60000.0, dtype=torch.float16) for name in "abc"}
    patch = delta_of({"a": torch.full((4,), 1e4), "b": torch.full((4,), 100.0), "c": torch.full((4,), 9e4)})
    with pytest.raises(RangeError) as caught:
        wl.apply(base, patch)
    assert caught.value.offenders == ("a F16[4]", "c F16[4]") and caught.value.exit_code == 4


def test_nan_and_infinity_name_every_tensor() -> None:
    base = {"a": torch.tensor([float("nan"), 1.0]), "b": torch.ones(2), "c": torch.tensor([1.0, float("-inf")])}
    patch = delta_of({name: torch.ones(2) for name in "abc"})
    with pytest.raises(NonFiniteError) as caught:
        wl.apply(base, patch)
    assert caught.value.offenders == ("a F32[2]", "c F32[2]") and caught.value.exit_code == 3
    got = wl.apply(base, patch, allow_nonfinite=True)
    assert torch.isnan(got["a"][0]) and got["a"][1] == 2.0 and got["c"].tolist() == [2.0, float("-inf")]


def test_nan_in_a_patch_names_it() -> None:
    patch = wl.diff(
        {"w": torch.zeros(2)}, {"w": torch.tensor([float("inf"), 1.0])}, encode="dense", allow_nonfinite=True
    )
    with pytest.raises(NonFiniteError) as caught:
        wl.apply({"w": torch.zeros(2)}, patch)
    assert caught.value.offenders == (f"w of {patch.label}",)


def test_exact_with_others_on_the_same_tensor_joins_the_sum() -> None:
    base, tuned = state(), state(1, 0.01)
    exact = wl.diff(base, tuned)
    other = delta_of({"layers.0.bias": torch.ones(16)})
    got = wl.apply(base, [exact, other])
    assert torch.equal(got["embed.weight"], tuned["embed.weight"])
    terms = sorted([(exact.id, tuned["layers.0.bias"] - base["layers.0.bias"]), (other.id, torch.ones(16))])
    expected = base["layers.0.bias"] + terms[0][1] + terms[1][1]
    assert torch.equal(got["layers.0.bias"], expected)
    half = wl.apply(base, 0.5 * exact)["layers.0.bias"]
    assert torch.equal(half, base["layers.0.bias"] + 0.5 * (tuned["layers.0.bias"] - base["layers.0.bias"]))


@pytest.mark.parametrize("encode", ["exact", "dense"])
def test_rows_added_and_removed(encode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"rows": torch.randn(700, 1000, generator=generator), "gone": torch.ones(2), "kept": torch.ones(2)}
    tuned = {
        "rows": torch.cat([base["rows"] + 0.25, torch.randn(500, 1000, generator=generator)]),
        "new": torch.randn(TILE + 9, generator=generator),
        "kept": torch.ones(2),
    }
    patch = wl.diff(base, tuned, encode=encode, allow=["added", "removed", "rows"])
    assert patch.header.requires == ["added", "removed", "rows"]
    got = wl.apply(base, patch)
    assert got.keys() == tuned.keys()
    assert all(torch.equal(got[name], tuned[name]) for name in tuned) or encode == "dense"
    assert torch.allclose(got["rows"], tuned["rows"]) and torch.equal(got["rows"][700:], tuned["rows"][700:])


def test_what_parts_hold_in_memory_is_given_back_after_the_last_tile() -> None:
    base = {"w": torch.zeros(3, TILE)}
    patch = wl.diff(base, {"w": torch.ones(3, TILE)}, encode="low_rank:1")
    source = MemorySource(base)
    target = fit(source, [StackEntry(patch, 1.0)]).targets["w"]
    workspace, offences, held = Workspace(), Offences(), []
    for start, stop in tiles(3 * TILE):
        clean = read_clean(source, target, start, stop, workspace)
        result = compute_tile(target, start, stop, clean, workspace, offences, False).view(torch.float32)
        assert torch.allclose(result, torch.ones(TILE))
        held.append(sorted(target.terms[0].parts._cache))
    assert held == [["part left", "part right"], ["part left", "part right"], []]


def test_digests_do_not_depend_on_threads_or_size() -> None:
    tensors = {"a": torch.arange(TILE + 5.0), "b": torch.tensor(2, dtype=torch.int64), "e": torch.empty(0, 3)}
    source = MemorySource(tensors)
    digests = digest_tensors(source, tensors, Resources(threads=1))
    assert digests == digest_tensors(source, tensors, Resources(threads=4, memory=2**31))
    head = b"weightlab tensor 1\0" + b"I64".ljust(16, b"\0") + bytes(8)
    assert digests["b"] == blake3(head + np.int64(2).tobytes()).hexdigest()
    assert len(set(digests.values())) == 3


def test_another_base_names_every_tensor_and_both_digests(tmp_path: Path) -> None:
    patch = make(tmp_path / "p.safetensors")
    source = MemorySource(state() | {"layers.0.bias": torch.zeros(16), "temperature": torch.tensor(9.0)})
    here = digest_tensors(source, ["layers.0.bias", "temperature"], Resources())
    with pytest.raises(WrongBaseError) as caught:
        check_bases(source, fit(source, [StackEntry(patch, 1.0)]).targets.values(), Resources())
    assert caught.value.offenders == tuple(
        f"{n}: {patch.label} is for {patch.records[n].base_digest}, here is {here[n]}"
        for n in ("layers.0.bias", "temperature")
    )
    assert caught.value.exit_code == 4
    entry = StackEntry(patch, 1.0, exclude=("layers.0.bias", "temperature"))
    assert set(check_bases(source, fit(source, [entry]).targets.values(), Resources())) == {
        "embed.weight",
        "layers.0.weight",
        "layers.1.conv",
    }
    assert check_bases(source, fit(source, [StackEntry(patch, 0.0)]).targets.values(), Resources()) == {}


def test_a_result_that_is_not_the_promised_one(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    make(path)
    changed(path, lambda c, h: h["tensors"]["layers.0.bias"].update(result_digest="0" * 64))
    with pytest.raises(IntegrityError, match=r"layers\.0\.bias: the result's digest is .* promised 0{64}"):
        wl.apply(state(), open_patch(path))
