"""Headers: one bad file for each rule, and what we write as the reference library reads it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.errors import MalformedFileError, MissingInputError
from weightlab.files.container import build_header, layout, read_header
from weightlab.files.foreign import strict_json
from weightlab.tensors.spec import DTYPES, TensorSpec

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]},
}


def raw(path: Path, header: bytes, data: bytes = bytes(12), length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def written(path: Path, tree: Any, data: bytes = bytes(12)) -> Path:
    return raw(path, json.dumps(tree).encode(), data)


def changed(**changes: Any) -> dict[str, Any]:
    """The good header with another `a`; None takes the entry away."""
    a = {**GOOD["a"], **changes}
    return {**GOOD, "a": {k: v for k, v in a.items() if v is not None}}


def refused(path: Path) -> MalformedFileError:
    with pytest.raises(MalformedFileError) as failed:
        read_header(path)
    assert failed.value.exit_code == 3
    assert str(path) in failed.value.message and failed.value.remedy
    return failed.value


def test_a_good_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {**GOOD, "__metadata__": {"k": "v"}})
    header = read_header(path)
    assert header.entries["b"].spec == TensorSpec("b", "BF16", (1, 2))
    assert header.entries["b"].offset == header.data_start + 8
    assert (header.metadata, header.file_size) == ({"k": "v"}, path.stat().st_size)
    with pytest.raises(MissingInputError):
        read_header(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes are too few"),
        (b"\x01\x00\x00", "3 bytes are too few"),
        (struct.pack("<Q", 2**60) + b"{}", "claims 1,152,921,504,606,846,976 bytes; the format allows"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "the format allows"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes and the file has 10"),
        (struct.pack("<Q", 2) + b"[]", "does not begin with"),
        (struct.pack("<Q", 3) + b" {}", "does not begin with"),
        (struct.pack("<Q", 3) + b"{a}", "not proper JSON"),
        (struct.pack("<Q", 8) + b'{"a":\xff\xfe}', "not proper JSON"),
        (struct.pack("<Q", 11) + b'{"a":NaN}  ', "NaN is not a number"),
        (struct.pack("<Q", 15) + b'{"a":Infinity} ', "Infinity is not a number"),
        (struct.pack("<Q", 15) + b'{"a":1,"a":2}  ', "the key 'a' appears twice"),
        (struct.pack("<Q", 200_001) + b"{" + b"[" * 200_000, "not proper JSON"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert says in refused(path).message


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": 5}, "a: not a description of a tensor"),
        (changed(dtype=None), "a: not a description"),
        (changed(extra=1), "a: not a description"),
        (changed(shape=2), "a: not a description"),
        (changed(data_offsets=[0]), "a: not a description"),
        (changed(data_offsets=[0.0, 8.0]), "a: not a description"),
        (changed(dtype=4), "a: not a description"),
        (changed(dtype="F33"), "a: unknown dtype 'F33'"),
        (changed(shape=[-2]), "a: impossible shape [-2]"),
        (changed(shape=[2.0]), "a: impossible shape [2.0]"),
        (changed(shape=[True]), "a: impossible shape [True]"),
        (changed(shape=[2**63]), "a: impossible shape"),
        (changed(shape=["2"]), "a: impossible shape"),
        (changed(dtype="F4", shape=[3]), "its elements do not fill whole bytes"),
        (changed(data_offsets=[-8, 0]), "are outside the file's 12 bytes"),
        (changed(data_offsets=[8, 0]), "are outside"),
        (changed(data_offsets=[8, 16]), "bytes 8..16 are outside"),
        (changed(data_offsets=[0, 2**63]), "are outside"),
        (changed(shape=[3]), "8 bytes, and its dtype and shape need 12"),
        (changed(shape=[2**40, 2**40, 2**40]), "its dtype and shape need"),
        ({**GOOD, "": GOOD["a"]}, "'': not a name"),
        ({"a\nb": GOOD["a"], "b": GOOD["b"]}, "'a\\nb': not a name"),
        ({"\x1b[2J": GOOD["a"], "b": GOOD["b"]}, "not a name"),
        ({"\ud800": GOOD["a"], "b": GOOD["b"]}, "not a name"),
    ],
)
def test_tensors_that_make_no_sense_are_named(tmp_path: Path, tree: Any, says: str) -> None:
    assert any(says in offender for offender in refused(written(tmp_path / "x", tree)).offenders)


def test_all_offenders_are_listed(tmp_path: Path) -> None:
    tree = {
        "a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        "b": 1,
        "c": GOOD["a"],
        "d": {**GOOD["b"], "shape": [9]},
    }
    assert [o[0] for o in refused(written(tmp_path / "x", tree)).offenders] == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("tree", "data"),
    [
        ({**GOOD, "b": {**GOOD["b"], "data_offsets": [4, 8]}}, 8),  # overlap
        ({**GOOD, "b": {**GOOD["b"], "data_offsets": [0, 4]}}, 8),
        ({**GOOD, "b": {**GOOD["b"], "data_offsets": [9, 13]}}, 13),  # a hole
        (GOOD, 13),  # bytes that belong to no tensor
        ({"b": {**GOOD["b"], "data_offsets": [8, 12]}}, 12),  # a hole at the beginning
    ],
)
def test_overlaps_and_holes(tmp_path: Path, tree: Any, data: int) -> None:
    refused(written(tmp_path / "x", tree, bytes(data)))


@pytest.mark.parametrize("metadata", [5, [], {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_is_strings(tmp_path: Path, metadata: Any) -> None:
    assert "metadata" in refused(written(tmp_path / "x", {**GOOD, "__metadata__": metadata})).message


@pytest.mark.parametrize("cut", [1, 4, 11, 12])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "x", GOOD)
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path)


def test_what_we_write_is_what_the_reference_library_reads(tmp_path: Path) -> None:
    specs = {
        name: TensorSpec(name, dtype, shape)
        for index, dtype in enumerate(DTYPES)
        for name, shape in ((f"w{index}", (4, 2)), (f"e{index}", (0, 2)), (f"s{index}", ()))
        if DTYPES[dtype].bits >= 8 or shape  # a scalar of half a byte cannot be
    }
    offsets, size = layout(specs)
    head = build_header(specs, offsets, {"format": "pt", "z": "1", "a": "2"})
    assert len(head) % 8 == 0
    assert head == build_header(dict(reversed(specs.items())), offsets, {"z": "1", "a": "2", "format": "pt"})
    path = tmp_path / "x"
    path.write_bytes(head + bytes(size))
    header = read_header(path)
    assert {n: e.spec for n, e in header.entries.items()} == specs
    assert all(e.offset % min(8, e.spec.type.itemsize) == 0 for e in header.entries.values())
    order = sorted(header.entries.values(), key=lambda e: e.offset)
    assert [e.spec.type.bits for e in order] == sorted((s.type.bits for s in specs.values()), reverse=True)
    with safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(specs)
        assert reference.metadata() == {"format": "pt", "z": "1", "a": "2"}
    text = head[8:].decode()
    assert json.loads(text) == strict_json(text)
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_room_that_was_kept_for_a_header() -> None:
    specs = {"a": TensorSpec("a", "F32", (2,))}
    head = build_header(specs, {"a": 0}, {}, size=256)
    assert len(head) == 256 and json.loads(head[8:])["a"]["shape"] == [2]
    with pytest.raises(AssertionError, match="does not fit"):
        build_header(specs, {"a": 0}, {}, size=16)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "x"
    for content in (
        noise,
        struct.pack("<Q", len(noise)) + noise,
        struct.pack("<Q", 2 + len(noise)) + b"{" + noise + b"}",
    ):
        path.write_bytes(content)
        try:
            read_header(path)
        except MalformedFileError:
            continue
        assert json.loads(content[8:]) in ({}, {"__metadata__": {}})


def test_odd_names_go_all_the_way(tmp_path: Path) -> None:
    names = ["../up", "/root", "a::b", "a::delta", "..", ".", "a b", "é", "W::frames", "a/b\\c", "x" * 300, "*", "[0]"]
    base = {n: torch.full((4, 4), float(i)) for i, n in enumerate(names)}
    tuned = {n: t + 0.5 for n, t in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    for encode in ("exact", "dense", "low_rank:1", "sign"):
        place = tmp_path / f"{encode[:4]}.safetensors"
        wl.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", place, encode=encode)
        wl.apply(tmp_path / "base.safetensors", place, in_place=True)
        found = load_file(tmp_path / "base.safetensors")
        assert set(found) == set(names)
        assert all(torch.allclose(found[n], tuned[n], atol=1e-5) for n in names)
        wl.remove(tmp_path / "base.safetensors", place)
        assert (tmp_path / "base.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {
        "base.safetensors",
        "tuned.safetensors",
        *(f"{e}.safetensors" for e in ("exac", "dens", "low_", "sign")),
    }


def test_a_path_that_the_library_cannot_open_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.safetensors"
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(path)
    with pytest.raises(MissingInputError, match="no UTF-8") as failed:
        read_header(path)
    assert failed.value.remedy == "rename it"
