"""Whatever a header says, opening and applying the patch ends well or in an error of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightlab as wl
from tests.patches.tools import Tree, read, write
from weightlab.errors import WeightlabError
from weightlab.files.digest import PartDigest
from weightlab.patches.patch import open_patch

BASE = {
    "matrix": torch.arange(160.0).reshape(10, 16),
    "vector": torch.arange(12.0),
    "counts": torch.arange(5),
    "rows": torch.ones(3, 8),
    "gone": torch.ones(2),
}
TUNED = {
    "matrix": BASE["matrix"] + torch.arange(160.0).reshape(10, 16).flip(0) / 7,
    "vector": BASE["vector"] * 1.01,
    "counts": BASE["counts"] + 1,
    "rows": torch.ones(5, 8) + 0.5,
    "new": torch.ones(2, 2),
}
ENCODINGS = ["exact", "dense:fp32", "quantized:4:log", "sparse:0.3", "low_rank:2", "sign"]

numbers = st.one_of(st.integers(-3, 20), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**70), 0.5, -0.0, 1e300]))
words = st.sampled_from(
    ["", "F32", "BF16", "I64", "F4", "F6_E2M3", "exact", "sign", "removed", "matrix", "a" * 64, "\0"]
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=2)),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths to values in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return ([path] if path else []) + [p for key, value in inner for p in places(value, (*path, key))]


def mutate(tree: Tree, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(tree)))
    *outer, last = path
    node: Any = tree
    for key in outer:
        node = node[key]
    if data.draw(st.booleans()) and isinstance(node, dict):
        node.pop(last)
    elif isinstance(node, dict) and data.draw(st.booleans()):
        node[data.draw(words)] = node.pop(last)
    else:
        node[last] = data.draw(values)


PLAUSIBLE: dict[str, list[Any]] = {
    "encoding": ["exact", "dense", "quantized", "sparse", "low_rank", "sign", "removed"],
    "dtype": ["F64", "F32", "BF16", "F16", "F8_E4M3", "I64", "I32", "BOOL", "C64", "F4", "F6_E2M3", "F8_E8M0"],
    "base_dtype": ["F64", "BF16", "F8_E5M2", "I64", "F4", None],
    "shape": [[10, 16], [16, 10], [160], [12], [5], [], [0], [3, 8], [5, 8], [1, 160], [2, 2], [2**40, 2**40]],
    "base_shape": [[3, 8], [5, 16], [9, 16], [], [0, 16], None],
    "added": [True, False],
    "base_digest": ["a" * 64, None],
    "result_digest": ["a" * 64, None],
    "error": [None, {"max_abs": -1.0, "relative_l2": 1e300}],
    "parameters": [
        {},
        {"rank": 1},
        {"rank": 2**40},
        {"bits": 2, "levels": "linear", "scope": "channel"},
        {"bits": 8, "levels": "tanh", "scope": "tensor"},
    ],
}


def reshape(header: Tree, data: st.DataObject) -> None:
    """Makes a record another one that could well be."""
    header["requires"] = ["added", "dtype", "removed", "rows"]
    record = header["tensors"][data.draw(st.sampled_from(sorted(header["tensors"])))]
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(PLAUSIBLE)))
        record[key] = data.draw(st.sampled_from(PLAUSIBLE[key]))


def swap(header: Tree, data: st.DataObject) -> None:
    """Exchanges what two names stand for."""
    tensors = header["tensors"]
    first, second = (data.draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    what = data.draw(st.sampled_from([None, "parts", "base_digest", "shape", "encoding", "parameters"]))
    one, other = (tensors, tensors) if what is None else (tensors[first], tensors[second])
    keys = (first, second) if what is None else (what, what)
    one[keys[0]], other[keys[1]] = other.get(keys[1]), one.get(keys[0])


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tree, Tree, bytes]]:
    folder = tmp_path_factory.mktemp("patches")
    found = {}
    for index, encode in enumerate(ENCODINGS):
        wl.diff(BASE, TUNED, folder / f"{index}.safetensors", encode=encode, allow=["added", "removed", "rows"])
        found[encode] = read(folder / f"{index}.safetensors")
    return found


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ENCODINGS), st.data())
def test_any_header(
    patches: dict[str, tuple[Tree, Tree, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    encode: str,
    data: st.DataObject,
) -> None:
    container, header, content = copy.deepcopy(patches[encode])
    kind = data.draw(st.sampled_from(["any", "any of the file", "plausible", "swapped"]))
    if kind == "plausible":
        reshape(header, data)
    elif kind == "swapped":
        swap(header, data)
    else:
        mutate(header if kind == "any" else container, data)
    path: Path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    write(path, container, header, content)
    try:
        patch = open_patch(path)
        assert repr(patch) and patch.summary() is not None and patch.nbytes() >= 0
        patch.verify()
    except WeightlabError:
        return
    for use in (patch, patch.at(0.5)):
        try:
            result = wl.apply(BASE, use)
        except WeightlabError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in result.values())


def with_digests(container: Tree, header: Tree, content: bytes) -> None:
    """Makes the header's digests those of the content, as a forger would."""
    for record in header["tensors"].values():
        for part in record["parts"].values():
            entry = container[part["entry"]]
            begin, end = entry["data_offsets"]
            digest = PartDigest(entry["dtype"])
            digest.update(content[begin:end])
            part["digest"] = digest.hexdigest(tuple(entry["shape"]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ENCODINGS), st.data())
def test_any_content_with_digests_that_fit(
    patches: dict[str, tuple[Tree, Tree, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
    encode: str,
    data: st.DataObject,
) -> None:
    container, header, content = copy.deepcopy(patches[encode])
    spoiled = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(spoiled) - 1))
        length = data.draw(st.integers(1, 40))
        fill = data.draw(st.one_of(st.sampled_from([b"\0", b"\xff", b"\x7f\x80"]), st.binary(min_size=1, max_size=40)))
        piece = (fill * length)[: min(length, len(spoiled) - begin)]
        spoiled[begin : begin + len(piece)] = piece
    with_digests(container, header, bytes(spoiled))
    path: Path = tmp_path_factory.getbasetemp() / "forged.safetensors"
    write(path, container, header, bytes(spoiled))
    patch = open_patch(path)
    patch.verify()
    for allow in (False, True):
        try:
            result = wl.apply(BASE, patch, allow_nonfinite=allow)
        except WeightlabError:
            continue
        finite = all(torch.isfinite(t).all() for t in result.values() if t.is_floating_point())
        assert finite or allow
