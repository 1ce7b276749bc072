"""`exact` in patch files: every bit comes back, and a damaged file never gives anything but the proper error."""

from __future__ import annotations

import contextlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import weightlab as wl
from tests.encodings.memory import SHAPES, same
from tests.patches.tools import make, overwrite, place_of, read, state, write
from weightlab.encodings.exact import ENCODING, as_dtype
from weightlab.errors import IntegrityError, MalformedFileError, NonFiniteError
from weightlab.patches.patch import Patch, open_patch
from weightlab.stream.executor import Resources
from weightlab.tensors.spec import DTYPES
from weightlab.tensors.tiles import TILE, tiles
from weightlab.tensors.workspace import Workspace

WHOLE = sorted(name for name, dtype in DTYPES.items() if dtype.bits >= 8)


def bit_patterns(shape: tuple[int, ...], dtype: str, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Two tensors of any bits at all, or whose bits differ a little."""
    generator = torch.Generator().manual_seed(seed)
    torch_type = DTYPES[dtype].torch
    size = DTYPES[dtype].itemsize
    assert torch_type is not None
    count = torch.Size(shape).numel()
    high = 2 if dtype == "BOOL" else 256
    before = torch.randint(0, high, (count, size), generator=generator, dtype=torch.uint8)
    if kind == "any":
        after = torch.randint(0, high, (count, size), generator=generator, dtype=torch.uint8)
    elif kind == "signs":
        after = before.clone()
        after[:, -1] ^= 1 if dtype == "BOOL" else 128
    else:
        after = before.clone()
        after[:, 0] ^= torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8)
    first, second = (b.reshape(-1).view(torch_type).reshape(shape) for b in (before, after))
    return first, second


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.sampled_from(SHAPES), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.sampled_from(WHOLE),
    st.integers(0, 2**31),
    st.sampled_from(["any", "signs", "low bits"]),
)
def test_all_bits_come_back(shape: tuple[int, ...], dtype: str, seed: int, kind: str) -> None:
    before, after = bit_patterns(shape, dtype, seed, kind)
    patch = wl.diff({"w": before}, {"w": after}, allow_nonfinite=True)
    assert patch.nbytes() <= after.nbytes + 24  # never more than the tensor and a row of the table
    assert list(patch.records) == ([] if same(before, after) else ["w"])
    patch.verify()
    applied = wl.apply({"w": before}, patch, allow_nonfinite=True)["w"]
    assert same(applied, after) and applied.shape == after.shape


@pytest.mark.parametrize("numel", [TILE - 1, TILE, TILE + 1, 2 * TILE + 12_345])
def test_across_tiles_where_only_some_changed(numel: int) -> None:
    before = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[-1] += 1.0
    patch = wl.diff({"w": before}, {"w": after})
    assert same(wl.apply({"w": before}, patch)["w"], after)
    assert patch.nbytes() < 1500 + 24 * (numel // TILE)


def test_special_values_come_back_with_their_bits() -> None:
    patterns = [0, 1, 2**31, 2**31 + 1, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFC12345, 0x3F800000]
    bits = torch.tensor(patterns, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    before, after = bits.repeat(10), bits.repeat_interleave(10)
    with pytest.raises(NonFiniteError) as caught:
        wl.diff({"w": before}, {"w": after})
    assert caught.value.offenders == ("w of state dict",)
    patch = wl.diff({"w": before}, {"w": after}, allow_nonfinite=True)
    assert same(wl.apply({"w": before}, patch, allow_nonfinite=True)["w"], after)


def test_a_negative_zero_is_a_change() -> None:
    before, after = torch.zeros(9), torch.zeros(9)
    after[4] = -0.0
    patch = wl.diff({"w": before}, {"w": after})
    assert same(wl.apply({"w": before}, patch)["w"], after)


def test_a_delta_beyond_fp32_is_no_obstacle() -> None:
    before, after = torch.tensor([3.4e38, 1.0]), torch.tensor([-3.4e38, 2.0])
    assert same(wl.apply({"w": before}, wl.diff({"w": before}, {"w": after}))["w"], after)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_tuned_dtype_is_kept(narrow: torch.dtype) -> None:
    wide = torch.randn(33, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 300.0, 1e5, 1e30])
    narrowed = torch.randn(33, 5).to(narrow)
    for before, after in ((wide, narrowed), (narrowed, wide), (narrowed, wide.double())):
        patch = wl.diff({"w": before}, {"w": after})
        record = patch.records["w"]
        assert record.spec("w").type.torch == after.dtype and record.base_dtype is not None
        assert patch.header.requires == ["dtype"]
        assert same(wl.apply({"w": before}, patch)["w"], after)


def test_what_the_tuned_dtype_cannot_hold_counts_as_zero() -> None:
    wide = torch.tensor([1.5, float("nan"), float("-inf"), 1e30, -65519.0, 65520.0])
    assert as_dtype(wide, torch.float16).tolist() == [1.5, 0.0, 0.0, 0.0, -65504.0, 0.0]
    assert as_dtype(wide.to(torch.float8_e5m2), torch.float32)[:3].tolist() == [1.5, 0.0, 0.0]
    assert as_dtype(wide, torch.float32) is wide


def test_the_same_bytes_with_any_number_of_threads_and_every_time(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    before = {f"w{i}": torch.randn(300_000 * (i % 3 + 1), generator=generator) for i in range(4)}
    after = {n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in before.items()}
    files: list[Path] = []
    for threads in (1, 4, 4):
        files.append(tmp_path / f"{len(files)}.safetensors")
        wl.diff(before, after, files[-1], resources=Resources(threads=threads, memory=2**31))
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    before = {"w": torch.randn(9000, generator=torch.Generator().manual_seed(0))}
    after = {"w": before["w"] + 1e-3 * torch.randn(9000, generator=torch.Generator().manual_seed(1))}
    torch.save((before, after), folder / "states.pt")
    wl.diff(before, after, folder / "good.safetensors")
    return folder


def restore(patch: Patch, base: Tensor) -> Tensor:
    """The tuned bits, decoded without looking at any digest."""
    parts, workspace = patch.parts("w"), Workspace()
    pieces = [ENCODING.restore(parts, a, b, base[a:b], workspace).clone() for a, b in tiles(base.numel())]
    return torch.cat(pieces).view(base.dtype)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["data", "frames"]), st.integers(0, 2**31), st.integers(0, 7))
def test_a_flipped_bit_is_found(good: Path, part: str, place: int, bit: int) -> None:
    base, tuned = torch.load(good / "states.pt")
    file = good / "flipped.safetensors"
    content = (good / "good.safetensors").read_bytes()
    file.write_bytes(content)
    offset, length = place_of(file, "w", part)
    at = offset + place % length
    overwrite(file, at, bytes([content[at] ^ 1 << bit]))
    patch = open_patch(file)
    with pytest.raises(IntegrityError) as caught:
        patch.verify()
    assert caught.value.offenders == (f"w, part {part!r}",) and caught.value.exit_code == 5
    with pytest.raises(IntegrityError):
        wl.apply(base, patch)
    with contextlib.suppress(IntegrityError):  # decoded without a look at digests: wrong weights, or refused
        assert restore(patch, base["w"]).shape == tuned["w"].shape


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.booleans())
def test_a_part_that_was_cut_short_is_found(good: Path, cut: int, fitting: bool) -> None:
    """Either the file just ends early, or its header was made to fit."""
    file = good / "cut.safetensors"
    container, header, data = read(good / "good.safetensors")
    cut = min(cut, len(data) - 1)
    if fitting:
        entry = container["w::data"]
        cut = min(cut, entry["shape"][0])
        entry["shape"][0] -= cut
        entry["data_offsets"][1] -= cut
    write(file, container, header, data[:-cut])
    if not fitting:
        with pytest.raises(MalformedFileError):
            open_patch(file)
        return
    patch = open_patch(file)
    with pytest.raises(IntegrityError, match="damaged"):
        patch.verify()
    with pytest.raises(IntegrityError, match="disagree"):
        restore(patch, torch.load(good / "states.pt")[0]["w"])


def test_a_frame_that_claims_a_terabyte_is_refused_before_it_is_unpacked(good: Path) -> None:
    file = good / "hostile.safetensors"
    file.write_bytes((good / "good.safetensors").read_bytes())
    offset, length = place_of(file, "w", "data")
    at = file.read_bytes().index(b"\x28\xb5\x2f\xfd", offset, offset + length)
    overwrite(file, at + 4, b"\xe0" + (2**40).to_bytes(8, "little"))
    with pytest.raises(IntegrityError, match="declares another size"):
        restore(open_patch(file), torch.load(good / "states.pt")[0]["w"])


def test_unchanged_tensors_take_no_room(tmp_path: Path) -> None:
    after = state()
    after["layers.0.bias"] = after["layers.0.bias"] + 1
    patch = wl.diff(state(), after, tmp_path / "p.safetensors")
    assert list(patch.records) == ["layers.0.bias"]
    assert sorted(read(tmp_path / "p.safetensors")[0]) == ["layers.0.bias::data", "layers.0.bias::frames"]


def test_only_its_own_base_will_do(tmp_path: Path) -> None:
    patch = make(tmp_path / "p.safetensors")
    other = state() | {"layers.0.bias": torch.zeros(16), "embed.weight": torch.zeros(24, 16)}
    with pytest.raises(wl.WeightlabError) as caught:
        wl.apply(other, patch)
    assert caught.value.exit_code == 4
    assert [line.split(":")[0] for line in caught.value.offenders] == ["embed.weight", "layers.0.bias"]
    for name, line in zip(("embed.weight", "layers.0.bias"), caught.value.offenders, strict=True):
        expected = patch.records[name].base_digest
        assert expected is not None and expected in line and line.count(expected) == 1 and len(line) > 140
