"""The lossless codec: every bit comes back, hostile frames are refused, and the format does not drift."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings

from weightlab.encodings._base import Tile
from weightlab.encodings._exact_codec import PLANES
from weightlab.encodings._exact_groups import RUN, classes_of
from weightlab.encodings._exact_words import layout_of
from weightlab.encodings.exact import ENCODING, decode_block, encode_block
from weightlab.errors import IntegrityError, UsageError
from weightlab.tensors.spec import DTYPES, TensorSpec
from weightlab.tensors.tiles import TILE, tiles

Array = np.ndarray[Any, np.dtype[Any]]
WHOLE = sorted(name for name, dtype in DTYPES.items() if dtype.bits >= 8)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def frames_of(base: Array, tuned: Array, dtype: str) -> list[Array]:
    return [np.frombuffer(frame, dtype=np.uint8) for frame in encode_block(base, tuned, dtype)]


def round_trip(base: Array, tuned: Array, dtype: str) -> int:
    """Checks that the tuned bytes come back; returns how many bytes the frames have."""
    frames = frames_of(base, tuned, dtype)
    size = sum(map(len, frames))
    assert size <= len(tuned)
    assert decode_block(base, frames, dtype).tobytes() == tuned.tobytes()
    return size


def raw(values: torch.Tensor) -> Array:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


def float_pair(dtype: torch.dtype, count: int, change: float) -> tuple[Array, Array]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(count, generator=generator, dtype=torch.float64) * 0.02
    tuned = base + torch.randn(count, generator=generator, dtype=torch.float64) * 0.02 * change
    return raw(base.to(dtype)), raw(tuned.to(dtype))


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(WHOLE),
    count=st.one_of(st.integers(1, 300), st.integers(1, 70_000)),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["random", "few", "low bits", "signs", "from zero", "to zero", "one run"]),
)
def test_round_trip_of_bit_patterns(dtype: str, count: int, seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    size = DTYPES[dtype].itemsize
    base = generator.integers(0, 256, count * size, dtype=np.uint8)
    tuned = base.copy()
    if kind == "random":
        tuned = generator.integers(0, 256, count * size, dtype=np.uint8)
    elif kind == "few":
        places = generator.integers(0, len(tuned), 1 + len(tuned) // 50)
        tuned[places] ^= generator.integers(0, 256, len(places), dtype=np.uint8)
    elif kind == "low bits":
        tuned[::size] ^= generator.integers(0, 4, count, dtype=np.uint8)
    elif kind == "signs":
        tuned[size - 1 :: size] ^= np.uint8(128)
    elif kind == "from zero":
        base = np.zeros_like(base)
    elif kind == "to zero":
        tuned = np.zeros_like(base)
    else:
        tuned[: 40 * size] ^= np.uint8(1)
    round_trip(base, tuned, dtype)


@pytest.mark.parametrize("dtype", WHOLE)
def test_round_trip_of_a_full_block(dtype: str) -> None:
    generator = np.random.default_rng(7)
    base = generator.integers(0, 256, TILE * DTYPES[dtype].itemsize, dtype=np.uint8)
    tuned = base.copy()
    tuned[:: 3 * DTYPES[dtype].itemsize] += np.uint8(1)
    round_trip(base, tuned, dtype)
    round_trip(base, generator.permutation(base), dtype)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("change", [1e-6, 1e-3, 0.1, 1.0, 1000.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 127, 128, 129, 70_000])
def test_round_trip_of_weights(dtype: str, change: float, count: int) -> None:
    round_trip(*float_pair(FLOATS[dtype], count, change), dtype)


def test_special_values() -> None:
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 1e-45, -1e-45, 3.4e38]
    base = np.repeat(np.asarray(values, dtype=np.float32), len(values))
    tuned = np.tile(np.asarray(values, dtype=np.float32), len(values))
    tuned.view(np.uint32)[4] = 0x7F812345  # a signalling NaN with a payload
    tuned.view(np.uint32)[5] = 0xFFFFFFFF
    round_trip(base.view(np.uint8), tuned.view(np.uint8), "F32")


@pytest.mark.parametrize("dtype", WHOLE)
def test_what_did_not_change_costs_nothing(dtype: str) -> None:
    generator = np.random.default_rng(3)
    base = generator.integers(0, 256, 70_000 * DTYPES[dtype].itemsize, dtype=np.uint8)
    assert round_trip(base, base.copy(), dtype) == 0
    tuned = base.copy()
    tuned[-1] ^= np.uint8(1)
    assert round_trip(base, tuned, dtype) < 1100


def test_same_bytes_every_time() -> None:
    base, tuned = float_pair(torch.float32, 50_000, 1e-3)
    assert encode_block(base, tuned, "F32") == encode_block(base.copy(), tuned.copy(), "F32")


def test_a_block_survives_the_next_ones() -> None:
    """The memory that a thread works in is used again; what is given out is not part of it."""
    pairs = [float_pair(torch.float32, count, 1e-3) for count in (50_000, 300, 70_000)]
    pairs.append((pairs[0][0], np.concatenate([pairs[0][0][:100_000], pairs[0][1][100_000:]])))  # some runs are equal
    coded = [frames_of(base, tuned, "F32") for base, tuned in pairs]
    decoded = [decode_block(base, frames, "F32") for (base, _), frames in zip(pairs, coded, strict=True)]
    assert [values.tobytes() for values in decoded] == [tuned.tobytes() for _, tuned in pairs]


def test_threads_do_not_meet() -> None:
    pairs = [float_pair(FLOATS[dtype], count, 1e-2) for dtype in ("F32", "BF16") for count in (60_000, 61_000)]
    bases, tuned = zip(*pairs * 8, strict=True)
    todo = bases, tuned, ("F32", "F32", "BF16", "BF16") * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode_block, *todo)) == list(map(encode_block, *todo))


@pytest.mark.parametrize(
    ("dtype", "change", "most"),
    [
        ("F32", 1e-4, 0.43),
        ("F32", 1e-2, 0.64),
        ("BF16", 1e-3, 0.12),
        ("BF16", 1e-2, 0.27),
        ("F16", 1e-3, 0.25),
        ("F64", 1e-4, 0.68),
    ],
)
def test_size(dtype: str, change: float, most: float) -> None:
    base, tuned = float_pair(FLOATS[dtype], TILE, change)
    assert round_trip(base, tuned, dtype) <= most * len(tuned)


# A block as it was stored when the format was fixed: these bytes must decode to this for ever.
GOLDEN: dict[str, list[str]] = {
    "F32": [
        "9700100000101000000000101000000505050505",
        "00360a",
        "4a92aaff780000000001",
        (
            "28b52ffd20822d020002c40d16d0a503c16c0110a104452aa005408422a942864d4a244592e4eaeaad1e95a3824748508142"
            "620e55656633336304ff6dfb3ef0fff7ed0610009b9c5bd87187116d"
        ),
        (
            "241b1209000101010101b492000e0501015e8240fe2fe8a0850c7836f4b201ba722ba72e9a5658341416f2d0d2b08e906c6e"
            "4c2a2c0ae6e8c8a4a662641e20dcdebaad5566a90e1f61b5c61a6e7fc2d3277b8ce0223398dbec94a53c4df405482bdf36c1"
            "59d08bf47c369bd64a7135"
        ),
        "",
    ],
    "BF16": [
        "8700100000101111010101",
        "00160a",
        "e0ca15ff78007c7f",
        (
            "28b52ffd2090ad0300a40601010201101011111200101026262422202e2e2c2a285050501614141210363434341a18c4e0c4"
            "c2c0f6f4d6f2d6f0d4f0d2d00604c4a6c218a6c28a18a68a18a6fa8816fefcdefadef8dcf8dad80e0c0cee0aec08ceeacee8"
            "cce8fc8a18e0fc8ae0fcdefac2de34c2de041000411d7718d106"
        ),
        (
            "90b2042222520e2f96fc52c98c05d93026ae3706bc3046f72b5e91ac3dfd984b6510b2dc74aee215c8da5084f73b6ea2cb65"
            "17d37f3964"
        ),
        "",
    ],
    "I32": [
        "1400000020",
        "0f2629",
        "",
        "28b52ffd602c00c50000300102030400f30600c003709c7a010d041340ea0150162d",
        "",
        "28b52ffd60800085000030000042000f00035002002e6aa78806",
    ],
}


def golden_pair(dtype: str) -> tuple[Array, Array]:
    """300 elements that differ by nothing, by little, and, the last floats, by far more than their exponent allows."""
    index = np.arange(300, dtype=np.int64)
    words = np.dtype(f"<u{DTYPES[dtype].itemsize}")
    if dtype == "I32":
        return index.astype(words).view(np.uint8), np.where(index == 77, 10**6, index + index % 5).astype(words).view(
            np.uint8
        )
    base = index * 2654435761 % 2**31 & 0xBFFFFFFF | 0x38000000
    change = np.where(index < 128, 0, np.where(index < 256, index % 3, index * 65537))
    if dtype == "BF16":
        base, change = base >> 16, change & 0xFFF
    return base.astype(words).view(np.uint8), (base + change).astype(words).view(np.uint8)


@pytest.mark.parametrize("dtype", sorted(GOLDEN))
def test_format_is_pinned(dtype: str) -> None:
    base, tuned = golden_pair(dtype)
    frames = [np.frombuffer(bytes.fromhex(frame), dtype=np.uint8) for frame in GOLDEN[dtype]]
    assert decode_block(base, frames, dtype).tobytes() == tuned.tobytes()


def declares(size: int | None, content: bytes = b"x" * 100) -> Array:
    """A valid zstd frame whose header is changed to declare another size; None: it declares none."""
    if size is None:
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(content)
        return np.frombuffer(frame, dtype=np.uint8)
    blocks = zstandard.ZstdCompressor(write_content_size=True, level=1).compress(content)[6:]
    return np.frombuffer(b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + blocks, dtype=np.uint8)


def swap(frames: list[Array], plane: int, frame: Array) -> list[Array]:
    return [frame if index == plane else old for index, old in enumerate(frames)]


@pytest.mark.parametrize("plane", range(1, len(PLANES)))
@pytest.mark.parametrize(
    "spoil",
    [
        lambda frame: declares(2**40),
        lambda frame: declares(None),
        lambda frame: declares(7),
        lambda frame: frame[:-1],
        lambda frame: np.append(frame, np.uint8(0)),
        lambda frame: np.concatenate([frame, frame]),
        lambda frame: frame[:4],
        lambda frame: np.zeros(10**6, dtype=np.uint8),
    ],
)
def test_hostile_frames_are_refused(plane: int, spoil: Callable[[Array], Array]) -> None:
    base, tuned = hostile_pair()
    frames = frames_of(base, tuned, "F32")
    assert all(map(len, frames))
    with pytest.raises(ValueError):
        decode_block(base, swap(frames, plane, spoil(frames[plane])), "F32")


def hostile_pair() -> tuple[Array, Array]:
    """A pair for which every plane is in use."""
    base, tuned = float_pair(torch.float32, 40_000, 1e-3)
    some = np.arange(40_000) % 4 == 0
    tuned.view(np.uint32)[some] = base.view(np.uint32)[some]
    tuned.view(np.uint32)[5::500] ^= np.uint32(1 << 22)
    return base, tuned


@pytest.mark.parametrize("rules", ["", "00", "0000", "ffff", "8000ff", "8000" + "0f" * 8, "8000" + "40" * 8])
def test_hostile_rules_are_refused(rules: str) -> None:
    base, tuned = hostile_pair()
    frames = frames_of(base, tuned, "F32")
    with pytest.raises(ValueError):
        decode_block(base, swap(frames, 0, np.frombuffer(bytes.fromhex(rules), dtype=np.uint8)), "F32")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 5), st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_decodes_to_the_same_length(plane: int, place: int, flip: int) -> None:
    base, tuned = hostile_pair()
    frames = [frame.copy() for frame in frames_of(base, tuned, "F32")]
    frames[plane][place % len(frames[plane])] ^= np.uint8(flip)
    with contextlib.suppress(ValueError):
        assert decode_block(base, frames, "F32").nbytes == tuned.nbytes


class Memory:
    """`Parts` and `Buffers` in memory."""

    parameters: Mapping[str, Any] = {}

    def __init__(self, spec: TensorSpec, parts: dict[str, torch.Tensor]) -> None:
        self.spec, self.parts, self.kept = spec, parts, dict[str, Any]()

    def read(self, part: str, start: int, stop: int, buffers: object) -> torch.Tensor:
        return self.parts[part].reshape(-1)[start:stop]

    def numel(self, part: str) -> int:
        return self.parts[part].numel()

    def cached(self, key: str, make: Callable[[], Any]) -> Any:
        return self.kept[key] if key in self.kept else self.kept.setdefault(key, make())

    def whole(self, part: str) -> torch.Tensor:
        return self.parts[part]

    def buffer(self, key: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype)


def stored(base: torch.Tensor, tuned: torch.Tensor, spec: TensorSpec) -> Memory:
    plan = ENCODING.prepare(Memory(spec, {}), {}, Memory(spec, {}))  # type: ignore[arg-type]
    pieces: dict[str, list[torch.Tensor]] = {"data": [], "frames": []}
    for start, stop in tiles(spec.stored.numel):
        tile = Tile(start, stop, base.reshape(-1)[start:stop], tuned.reshape(-1)[start:stop], torch.empty(0))
        values, approximate = ENCODING.encode(plan, spec, tile)
        assert approximate is None
        for part, piece in values.items():
            pieces[part].append(piece)
    shape = plan.parts["frames"].shape
    table = torch.cat(pieces["frames"]).reshape(shape) if shape[0] else torch.empty(shape, dtype=torch.uint32)
    data = torch.cat([torch.empty(0, dtype=torch.uint8), *pieces["data"]])
    assert plan.growing is not None and data.numel() <= plan.growing[1] == spec.nbytes
    for part, whole in (("data", data), ("frames", table)):
        found = TensorSpec(part, "U8" if part == "data" else "U32", tuple(whole.shape))
        assert ENCODING.expected(spec, {})[part].problem(found) == ""
    return Memory(spec, {"data": data, "frames": table})


def restored(parts: Memory, base: torch.Tensor) -> torch.Tensor:
    flat = base.reshape(-1)
    pieces = [ENCODING.restore(parts, a, b, flat[a:b], parts).clone() for a, b in tiles(parts.spec.stored.numel)]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(piece.view(torch.uint8) for piece in pieces)])


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (TILE,), (TILE + 1,), (2, TILE)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3", "F64", "I64", "BOOL", "C64", "F4"])
def test_plugin_round_trip(shape: tuple[int, ...], dtype: str) -> None:
    spec = TensorSpec("layer.weight", dtype, shape)
    generator = torch.Generator().manual_seed(5)
    kind = spec.stored.type.torch
    assert kind is not None
    base = torch.randint(0, 2, (spec.nbytes,), generator=generator, dtype=torch.uint8).view(kind)
    tuned = torch.randint(0, 2, (spec.nbytes,), generator=generator, dtype=torch.uint8).view(kind)
    parts = stored(base, tuned, spec)
    assert torch.equal(restored(parts, base), tuned.view(torch.uint8))
    for start, stop in tiles(spec.stored.numel):
        found = ENCODING.restore(parts, start, stop, base[start:stop], parts)
        assert found.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)
        assert found.element_size() == spec.stored.type.itemsize and found.shape == (stop - start,)


def test_plugin_decodes_the_delta_for_a_base_of_another_dtype() -> None:
    base = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    tuned = (base + 0.01).to(torch.bfloat16)
    parts = stored(base.to(torch.bfloat16), tuned, TensorSpec("w", "BF16", (1000,)))
    out = torch.empty(1000)
    ENCODING.decode(parts, 0, 1000, base, out, parts)
    assert torch.equal(out, tuned.float() - base)


def test_plugin_names_the_tensor_of_bad_bytes() -> None:
    base = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    spec = TensorSpec("layer.weight", "F32", (5000,))
    good = stored(base, base + 0.001, spec)
    table = good.parts["frames"].numpy().astype(np.int64)
    for change in (1, -1):
        wrong = torch.from_numpy((table + [[0, 0, 0, change, 0, 0]]).astype(np.uint32))
        with pytest.raises(IntegrityError, match=r"layer\.weight"):
            restored(Memory(spec, {"data": good.parts["data"], "frames": wrong}), base)
    moved = torch.from_numpy((table + [[0, 0, 0, 1, -1, 0]]).astype(np.uint32))
    for parts in (
        {"data": good.parts["data"], "frames": moved},
        {"data": good.parts["data"][:-1], "frames": good.parts["frames"]},
        {"data": torch.cat([good.parts["data"], good.parts["data"][:1]]), "frames": good.parts["frames"]},
        {"data": good.parts["data"].flip(0), "frames": good.parts["frames"]},
    ):
        with pytest.raises(IntegrityError, match=r"layer\.weight"):
            restored(Memory(spec, parts), base)


def test_plugin_takes_no_parameter() -> None:
    assert ENCODING.parse([]) == {}
    with pytest.raises(UsageError):
        ENCODING.parse(["9"])


@pytest.mark.parametrize(
    ("dtype", "bits", "mantissa", "lengths", "context", "direct"),
    [
        ("F64", 64, 52, 54, 5, 51),
        ("F32", 32, 23, 25, 5, 22),
        ("C64", 32, 23, 25, 5, 22),
        ("BF16", 16, 7, 9, 1, 6),
        ("F16", 16, 10, 12, 2, 9),
        ("F8_E4M3", 8, 3, 5, 0, 2),
        ("F8_E5M2", 8, 2, 4, 0, 1),
        ("I64", 64, 0, 65, 0, 65),
        ("U8", 8, 0, 9, 0, 9),
        ("BOOL", 8, 0, 9, 0, 9),
    ],
)
def test_how_the_words_of_a_dtype_are_read(
    dtype: str, bits: int, mantissa: int, lengths: int, context: int, direct: int
) -> None:
    """Lengths are below mantissa + 2, or bits + 1 where all bits count; these numbers are part of the format."""
    layout = layout_of(dtype)
    assert (layout.bits, layout.size, layout.mantissa) == (bits, bits // 8, mantissa)
    assert (layout.lengths, layout.context, layout.direct) == (lengths, context, direct)
    assert layout.is_float == (mantissa > 0)


def test_how_far_a_run_moved_comes_from_powers_of_two() -> None:
    """Differences just below 2**30 count as 2**29, those of a run without any as nothing."""
    layout = layout_of("I64")
    difference = np.zeros(2 * RUN, dtype=layout.signed)
    difference[:RUN] = 2**30 - 1
    largest, classes = classes_of(np.zeros(2 * RUN, np.int16), difference, difference, layout)
    again, same = classes_of(np.zeros(2 * RUN, np.int16), difference, np.where(difference, 2**29, 0), layout)
    assert largest == again and classes.tolist() == same.tolist() and classes[1] == 0 < classes[0]
