"""Differences as patches: what is stored, the errors that are recorded, what is refused, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import weightlab as wl
from tests.encodings.memory import FLOATS, SHAPES, same
from weightlab.errors import UsageError
from weightlab.extract.diff import DiffOptions, diff_sources
from weightlab.patches.patch import Patch
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources
from weightlab.tensors.spec import DTYPES
from weightlab.tensors.tiles import TILE, tiles
from weightlab.tensors.workspace import Workspace

LOSSY = [
    "dense",
    "dense:bf16",
    "quantized:4",
    "quantized:3:log:channel",
    "quantized:6:tanh",
    "sparse:0.2",
    "sparse:0.5:random:3",
    "low_rank:2",
    "low_rank:energy:0.8",
    "sign",
]
COMPUTE = {True: torch.float64, False: torch.float32}


def pair(shape: tuple[int, ...], before: str, after: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return base.to(DTYPES[before].torch), tuned.to(DTYPES[after].torch)


def decoded(patch: Patch, name: str, base: Tensor) -> Tensor:
    """The stored delta in the dtype that it is applied in."""
    spec = patch.records[name].spec(name)
    out = torch.full((spec.numel,), 3.0, dtype=COMPUTE[spec.dtype == "F64"])
    parts, workspace = patch.parts(name), Workspace()
    for start, stop in tiles(spec.numel):
        flat = base.reshape(-1)[start:stop]
        patch.encoding(name).decode(parts, start, stop, flat, out[start:stop], workspace)
    return out


def check_error(patch: Patch, name: str, base: Tensor, tuned: Tensor) -> None:
    """The recorded error is the one that a reader of the patch finds."""
    compute = COMPUTE[torch.float64 in (base.dtype, tuned.dtype)]
    delta = (tuned.to(compute) - base.to(compute)).double().reshape(-1)
    error = decoded(patch, name, base).double() - delta
    recorded = patch.records[name].error
    assert recorded is not None
    assert recorded.max_abs == pytest.approx(float(error.abs().max()) if len(error) else 0.0, rel=1e-5, abs=1e-7)
    expected = float(error.norm() / delta.norm()) if delta.any() else 0.0
    assert recorded.relative_l2 == pytest.approx(expected, rel=1e-5, abs=1e-7)


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(LOSSY),
    st.one_of(st.sampled_from(SHAPES), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.sampled_from(FLOATS),
    st.one_of(st.none(), st.sampled_from(FLOATS)),
    st.integers(0, 2**31),
)
def test_the_recorded_error_is_the_real_one(
    encode: str, shape: tuple[int, ...], before: str, after: str | None, seed: int
) -> None:
    base, tuned = pair(shape, before, after or before, seed)
    patch = wl.diff({"w": base}, {"w": tuned}, encode=encode)
    patch.verify()
    compute = COMPUTE["F64" in (before, after)]
    changed = bool((base.to(compute) != tuned.to(compute)).any())
    assert list(patch.records) == (["w"] if changed else [])
    if not changed:
        return
    record = patch.records["w"]
    assert record.dtype == before and record.shape == list(shape)  # it lands in the base's dtype
    assert record.encoding in (encode.split(":")[0], "dense")
    assert (record.encoding == encode.split(":")[0]) == ("instead_of" not in record.parameters)
    check_error(patch, "w", base, tuned)


@pytest.mark.parametrize("encode", [*LOSSY, "exact"])
def test_across_tiles_with_any_number_of_threads(encode: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "long": torch.randn(3, TILE // 2 + 7, generator=generator),
        "tall": torch.randn(TILE // 64 + 100, 66, generator=generator),
        "flat": torch.randn(TILE + 1, generator=generator),
        "conv": torch.randn(8, 4, 3, 3, generator=generator),
    }
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    files: list[bytes] = []
    for threads in (1, 4, 4):
        out = tmp_path / f"{len(files)}.safetensors"
        patch = wl.diff(base, tuned, out, encode=encode, resources=Resources(threads=threads, memory=2**31))
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    for name in base:
        if encode == "exact":
            assert same(wl.apply(base, patch)[name], tuned[name])
        else:
            check_error(patch, name, base[name], tuned[name])


def test_what_low_rank_cannot_help_is_dense_and_the_header_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        "a.norm": torch.zeros(64),
        "a.w": torch.zeros(64, 64),
        "a.small": torch.zeros(3, 3),
        "b.norm": torch.zeros(64),
    }
    tuned = {n: torch.randn(t.shape, generator=generator) for n, t in base.items()}
    patch = wl.diff(base, tuned, encode=["low_rank:16", "a.norm*=dense:bf16"])
    found = {n: (r.encoding, r.parameters) for n, r in patch.records.items()}
    assert found == {
        "a.norm": ("dense", {}),
        "a.w": ("low_rank", {"rank": 16}),
        "a.small": ("dense", {"instead_of": "low_rank"}),
        "b.norm": ("dense", {"instead_of": "low_rank"}),
    }
    by_energy = wl.diff(base, tuned, encode="low_rank:energy:0.999")  # noise: all of its rank would be needed
    assert by_energy.records["a.w"].parameters == {"instead_of": "low_rank"}
    assert torch.equal(wl.apply(base, by_energy)["a.w"], tuned["a.w"])


def test_opaque_and_added_tensors_are_exact_whatever_is_asked() -> None:
    base = {"w": torch.zeros(9, 9), "ids": torch.arange(9)}
    tuned = {"w": torch.ones(9, 9), "ids": torch.arange(9) + 1, "new": torch.ones(9, 9)}
    patch = wl.diff(base, tuned, encode="sign", allow=["added"])
    assert {n: r.encoding for n, r in patch.records.items()} == {"ids": "exact", "new": "exact", "w": "sign"}
    assert patch.header.result is None


def test_rows_that_are_appended() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 12, generator=generator)
    grown = torch.cat([base + 1e-3 * torch.randn(20, 12, generator=generator), torch.randn(4, 12, generator=generator)])
    for encode in (None, *LOSSY):
        patch = wl.diff({"w": base}, {"w": grown}, encode=encode, allow="rows")
        record = patch.records["w"]
        assert record.base_shape == [20, 12] and record.shape == [24, 12] and patch.header.requires == ["rows"]
        got = wl.apply({"w": base}, patch)["w"]
        if encode == "dense:bf16":
            assert torch.equal(got[20:], grown[20:].bfloat16().float())
        else:  # an approximation made for small changes must not spoil the values of new rows
            assert torch.equal(got[20:], grown[20:])
            assert torch.allclose(got, grown, atol=1e-6)
        with pytest.raises(wl.WeightlabError, match="new rows hold values"):
            wl.apply({"w": base}, 0.5 * patch)
    unasked = pytest.raises(wl.WeightlabError, match="--allow rows")
    with unasked:
        wl.diff({"w": base}, {"w": grown})


@pytest.mark.parametrize("encode", ["exact", *LOSSY])
def test_narrow_base_and_wide_tune(encode: str) -> None:
    """A trainer that saves fp32 of a bf16 model, some of whose layers were frozen."""
    generator = torch.Generator().manual_seed(0)
    base = {
        n: torch.randn(s, generator=generator).bfloat16()
        for n, s in (("a", (40, 40)), ("b", (40,)), ("frozen", (40, 40)))
    }
    tuned = {n: t.float() + (0 if n == "frozen" else 0.01) for n, t in base.items()}
    patch = wl.diff(base, tuned, encode=encode)
    if encode == "exact":
        assert patch.header.requires == ["dtype"] and patch.records["frozen"].dtype == "F32"
        assert all(same(t, tuned[n]) for n, t in wl.apply(base, patch).items())
        return
    assert set(patch.records) == {"a", "b"} and patch.header.requires == []
    assert {n: t.dtype for n, t in wl.apply(base, patch).items()} == dict.fromkeys(base, torch.bfloat16)
    for name in patch.records:
        check_error(patch, name, base[name], tuned[name])


def test_a_zero_that_changed_its_sign_counts_for_exact_alone() -> None:
    before, after = torch.zeros(10, 10), torch.zeros(10, 10)
    after[3, 3] = -0.0
    assert list(wl.diff({"w": before}, {"w": after}).records) == ["w"]
    for encode in LOSSY:
        assert list(wl.diff({"w": before}, {"w": after}, encode=encode).records) == []


def test_unchanged_tensors_take_no_room() -> None:
    base = {f"w{i}": torch.full((TILE + 3,), float(i)) for i in range(3)}
    tuned = {n: t.clone() for n, t in base.items()}
    tuned["w1"][-1] += 1
    for encode in ("exact", "dense"):
        patch = wl.diff(base, tuned, encode=encode)
        assert list(patch.records) == ["w1"]


def test_include_and_exclude() -> None:
    base = {n: torch.zeros(3) for n in ("a.w", "a.b", "c.w")}
    tuned = {n: torch.ones(3) for n in base}
    assert list(wl.diff(base, tuned, include=["*.w"]).records) == ["a.w", "c.w"]
    assert list(wl.diff(base, tuned, include="*.w").records) == ["a.w", "c.w"]
    assert list(wl.diff(base, tuned, include=["a.*"], exclude=["*.b"]).records) == ["a.w"]
    part, whole = wl.diff(base, tuned, exclude="c.w"), wl.diff(base, tuned)
    assert part.header.base.fingerprint is None and part.header.result is None
    assert whole.header.base.fingerprint is not None and whole.header.result is not None
    with pytest.raises(UsageError) as caught:
        wl.diff(base, tuned, include=["a.*", "z*"], exclude=["q"])
    assert caught.value.offenders == ("'z*'", "'q'")


def test_renamed_prefixes() -> None:
    base = {"encoder.w": torch.zeros(3), "head.w": torch.zeros(2)}
    tuned = {"bert.encoder.w": torch.ones(3), "head.w": torch.ones(2)}
    patch = wl.diff(base, tuned, renames={"bert.": ""})
    assert list(patch.records) == ["encoder.w", "head.w"]
    assert wl.apply(base, patch)["encoder.w"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(UsageError, match="no tensor name has"):
        wl.diff(base, base, renames={"gpt.": ""})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"allow": ["add"]}, "choose from added, removed, rows"),
        ({"allow": "everything"}, "'everything'"),
        ({"base_name": "/models/base"}, "ORG/NAME"),
        ({"base_name": "../base"}, "ORG/NAME"),
        ({"base_name": "a/b/c"}, "ORG/NAME"),
        ({"encode": ["*nrom*=dense"]}, "match no tensor"),
        ({"encode": "dence"}, "did you mean 'dense'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        wl.diff({"w": torch.zeros(2)}, {"w": torch.ones(2)}, **options)
    assert what in str(caught.value)


def test_what_the_header_says() -> None:
    patch = wl.diff(
        {"w": torch.zeros(2)},
        {"w": torch.ones(2)},
        base_name="org/base-1.5b",
        revision="main",
        license="MIT",
        notes="first try",
    )
    header = patch.header
    assert (header.kind, header.method.name, header.license, header.notes) == ("diff", "diff", "MIT", "first try")
    assert (header.base.name, header.base.revision) == ("org/base-1.5b", "main")
    assert (
        header.created is not None and header.created.tool == "weightlab" and header.created.version == wl.__version__
    )


def test_what_no_patch_is_taken_of_as_a_sum() -> None:
    """For composed patches: the zeros that stand for a base are no base."""
    options = DiffOptions(encode="dense", allow=["removed"], base_known=False, base_fingerprint="a" * 64)
    base = MemorySource({"w": torch.zeros(3), "gone": torch.zeros(1)})
    patch = diff_sources(base, MemorySource({"w": torch.ones(3)}), None, options)
    assert {n: r.base_digest for n, r in patch.records.items()} == {"w": None, "gone": None}
    assert patch.header.base.fingerprint == "a" * 64
