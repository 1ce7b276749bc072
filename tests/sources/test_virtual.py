"""Sources that are no files: state dicts, other names, zeros, differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.sources.test_local import read
from weightlab.errors import InputError, NamesMismatchError, UsageError
from weightlab.sources.local import open_local
from weightlab.sources.virtual.computed import ComputedSource, read_values
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.sources.virtual.joined import JoinedSource
from weightlab.sources.virtual.memory import MemorySource
from weightlab.sources.virtual.named import NamedSource
from weightlab.sources.virtual.projected import ProjectedSource
from weightlab.sources.virtual.renamed import RenamedSource
from weightlab.sources.virtual.zeros import ZeroSource
from weightlab.tensors.spec import BY_TORCH, TensorSpec


def test_state_dicts_of_every_dtype_and_layout() -> None:
    whole = torch.randn(6, 8)
    state = {
        "plain": whole,
        "turned": whole.t(),
        "part": whole[::2, 1:5],
        "expanded": torch.ones(1).expand(5),
        "one of many": torch.arange(90)[7::80][:1],
        "one row, one column": whole[1:2, 3:4],
        "bf16": whole.bfloat16(),
        "fp8": whole.to(torch.float8_e4m3fn),
        "bool": whole > 0,
        "complex": torch.randn(3, dtype=torch.complex64),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    source = MemorySource(state)
    for name, tensor in state.items():
        found = read(source, name)
        assert found.shape == tensor.shape and found.dtype == tensor.dtype
        right = tensor.clone(memory_format=torch.contiguous_format)
        assert torch.equal(found.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    out = torch.empty(8, dtype=torch.uint8)
    source.read("turned", 4, out)
    assert torch.equal(out.view(torch.float32), whole.t().contiguous().flatten()[1:3])


def test_ranges_of_a_tensor_that_is_not_contiguous_do_not_copy_it_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource({"turned": torch.randn(64, 64).t(), "other": torch.randn(8, 8).t()})
    copies = []
    real = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: (copies.append(t.shape), real(t))[1])
    out = torch.empty(64, dtype=torch.uint8)
    for start in range(0, 64 * 64 * 4, 64):
        source.read("turned", start, out)
    assert len(copies) == 1
    source.read("other", 0, out)
    source.read("turned", 0, out)
    assert len(copies) == 3  # one copy at a time is held, not all of them


def test_four_bit_floats_have_two_elements_a_byte() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    source = MemorySource({"f4": codes})
    assert source.specs["f4"] == TensorSpec("f4", "F4", (2, 8))
    out = torch.empty(8, dtype=torch.uint8)
    source.read("f4", 0, out)
    assert out.tolist() == list(range(8))


def test_which_of_two_names_is_the_tensor_does_not_depend_on_their_order() -> None:
    shared = torch.randn(3)
    for state in ({"b": shared, "a": shared}, {"a": shared, "b": shared}):
        source = MemorySource(state)
        assert dict(source.aliases) == {"b": "a"} and set(source.specs) == {"a"}
    nothing = torch.zeros(0)
    assert MemorySource({"a": nothing, "b": nothing}).aliases == {}


def test_what_is_no_tensor_is_listed() -> None:
    wrong: dict[str, Any] = {"a": 1, "b": torch.zeros(2), "c": torch.zeros(2, 2).to_sparse(), "d": None}
    with pytest.raises(InputError) as failed:
        MemorySource(wrong)
    assert sorted(o.split(":")[0] for o in failed.value.offenders) == ["a", "c", "d"]


def test_other_names() -> None:
    shared = torch.randn(3)
    source = RenamedSource(
        MemorySource({"model.a": shared, "model.b": shared, "c": torch.ones(2), "n": torch.tensor(1)}), {"model.": ""}
    )
    assert set(source.specs) == {"a", "c", "n"} and dict(source.aliases) == {"b": "a"} and source.opaque == {"n"}
    assert source.specs["a"].name == "a" and torch.equal(read(source, "a"), shared)
    with pytest.raises(UsageError):
        RenamedSource(MemorySource({"a": shared}), {"x.": ""})
    with pytest.raises(NamesMismatchError):
        RenamedSource(MemorySource({"x.a": shared, "a": torch.ones(1)}), {"x.": ""})


def test_codes_go_with_the_other_names(tmp_path: Path) -> None:
    fp8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    save_file({"model.a.weight": fp8, "model.a.weight_scale": torch.ones(1), "b.weight": torch.ones(2)}, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "m.safetensors")
    inner = open_local(tmp_path / "m.safetensors")
    assert {n: c.module for n, c in inner.codes.items()} == dict.fromkeys(
        ["model.a.weight", "model.a.weight_scale"], "model.a"
    )
    for new in ("", "x.", "much.longer."):
        source = RenamedSource(inner, {"model.": new})
        assert {n: c.module for n, c in source.codes.items()} == dict.fromkeys(
            [f"{new}a.weight", f"{new}a.weight_scale"], f"{new}a"
        )
    inner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_range_of_computed_tensors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("weightlab.sources.virtual.computed.TILE", 4)
    whole = torch.arange(10, dtype=dtype)
    raw, asked = whole.view(torch.uint8), []

    def compute(name: str, first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        return whole[first:last]

    source = ComputedSource("x", {"a": TensorSpec("a", BY_TORCH[dtype].name, (10,))}, compute)
    for start in range(len(raw)):
        for stop in range(start, len(raw) + 1):
            out = torch.empty(stop - start, dtype=torch.uint8)
            source.read("a", start, out)
            assert torch.equal(out, raw[start:stop])
    assert set(asked) == {(0, 4), (4, 8), (8, 10)}
    asked.clear()
    source.read("a", 4 * dtype.itemsize, torch.empty(4 * dtype.itemsize, dtype=torch.uint8))
    assert asked == [(4, 8)]
    some = read_values(source, "a", 3, 9, torch.empty(6 * dtype.itemsize, dtype=torch.uint8))
    assert torch.equal(some, whole[3:9])


def test_a_tied_tensor_under_another_of_its_names() -> None:
    shared = torch.randn(3)
    source = NamedSource(MemorySource({"a": shared, "b": shared, "c": torch.ones(1)}), {"b": "a", "c": "c"})
    assert set(source.specs) == {"b", "c"} and dict(source.aliases) == {"a": "b"}
    assert torch.equal(read(source, "b"), shared)


def test_zeros() -> None:
    source = ZeroSource({"a": TensorSpec("a", "BF16", (2, 3))})
    assert torch.equal(read(source, "a"), torch.zeros(2, 3, dtype=torch.bfloat16))


def test_differences_are_exact_in_fp32_and_fp64() -> None:
    base = {"a": torch.randn(5, 4).bfloat16(), "b": torch.randn(3, dtype=torch.float64), "c": torch.randn(2)}
    tuned = {"a": torch.randn(5, 4), "b": torch.randn(3, dtype=torch.float64), "c": torch.randn(2)}
    source = DifferenceSource(MemorySource(base), MemorySource(tuned), ["a", "b"])
    assert {n: s.dtype for n, s in source.specs.items()} == {"a": "F32", "b": "F64"}
    assert torch.equal(read(source, "a"), tuned["a"] - base["a"].float())
    assert torch.equal(read(source, "b"), tuned["b"] - base["b"])
    half = DifferenceSource(MemorySource(base), MemorySource(tuned), ["c"], factor=0.5)
    assert torch.equal(read(half, "c"), (tuned["c"] - base["c"]) * 0.5)


def test_projected_and_joined() -> None:
    first, second = {"a": torch.randn(6), "b": torch.randn(6)}, {"a": torch.randn(6), "b": torch.randn(6)}
    source = ProjectedSource(MemorySource(first), MemorySource(second), {"a": 0.3})
    assert torch.allclose(read(source, "a"), first["a"] - 0.3 * second["a"])
    assert torch.equal(read(source, "b"), first["b"])
    both = JoinedSource([source, MemorySource({"n": torch.tensor(1)})], "both")
    assert set(both.specs) == {"a", "b", "n"} and both.opaque == {"n"} and both.label == "both"
    with pytest.raises(AssertionError):
        JoinedSource([source, source], "twice")


def test_under_another_name_what_has_no_sums_has_none() -> None:
    held = MemorySource({"embed": torch.ones(2, 2), "steps": torch.tensor([1, 2])})
    shown = NamedSource(held, {"head": "embed", "count": "steps"})
    assert shown.opaque == {"count"} and shown.specs.keys() == {"head", "count"}
