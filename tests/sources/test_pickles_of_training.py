"""Checkpoints as trainers save them: other things beside the weights, several state dicts, tensors without values."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import random
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import weightlab as wl
from tests.sources.test_pickled import opened, same
from weightlab.errors import (
    InputError,
    MalformedFileError,
    UnsafePickleError,
    UnsupportedFormatError,
    WeightlabError,
)
from weightlab.sources import cautions_of, open_source
from weightlab.sources._unpickling import unpickle


def state(shift: float = 0.0) -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3) + shift, "b.bias": torch.tensor([1.0, 2.0]) + shift}


PLAIN = {
    "Namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "scalar of numpy": numpy.float64(0.9),
    "array of numpy": numpy.arange(4),
    "dtype of numpy": numpy.dtype("float32"),
    "path": pathlib.PurePosixPath("a/b"),
    "date": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    "set": {1, 2},
    "frozenset": frozenset("ab"),
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "complex": 1j,
    "large number": 2**100,
    "BytesIO": io.BytesIO(b"x"),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_beside_the_weights(tmp_path: Path, kind: str, new: bool) -> None:
    torch.save({"model": state(), "args": PLAIN[kind]}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert same(opened(tmp_path / "x.pt"), state())


def test_what_is_no_tensor_among_them_is_skipped_and_told(tmp_path: Path) -> None:
    extra = {"a._extra_state": None, "b._extra_state": io.BytesIO(b"x"), "updates": 7, "decay": 0.9, "name": "net"}
    torch.save({"model": {**state(), **extra}}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert set(source.specs) == set(state())
    (told,) = cautions_of(source)
    kinds = ["None", "BytesIO", "int", "float", "str"]
    assert all(f"{name} ({kind})" in told for name, kind in zip(extra, kinds, strict=True))
    assert told in wl.inspect(tmp_path / "x.pt").notes
    patch = wl.diff(state(), tmp_path / "x.pt")
    assert told in (patch.header.notes or "")
    assert told in wl.apply(tmp_path / "x.pt", patch, out=tmp_path / "out").notes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
def test_protocols_of_pickle(tmp_path: Path, protocol: int, new: bool) -> None:
    content = {"model": {**state(), "half": torch.ones(2, dtype=torch.float8_e4m3fn)}, "epoch": 300, "big": -70000}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    found = opened(tmp_path / "x.pt")
    assert torch.equal(found.pop("half").float(), torch.ones(2)) and same(found, state())


def test_which_state_dict_is_taken(tmp_path: Path) -> None:
    path, one, two = tmp_path / "x.pt", state(), state(1)
    torch.save({"state_dict": one, "state_dict_ema": two, "optimizer": {"state": {"a": torch.ones(2)}}}, path)
    assert same(opened(path), one) and same(opened(path, "state_dict_ema"), two)
    assert "state_dict_ema (2 tensors)" in cautions_of(open_source(path))[0]
    torch.save({"net": one, "epoch": 3}, path)
    assert same(opened(path), one)
    torch.save({"optimizer": {"state": {"a": torch.ones(2)}}}, path)
    with pytest.raises(InputError, match="no state dict"):
        open_source(path)
    torch.save({"optimus": one}, path)
    assert same(opened(path), one)
    for content in ({"student": one, "teacher": two}, {"model": one, "state_dict": {**two, "c": torch.ones(1)}}):
        torch.save(content, path)
        with pytest.raises(InputError, match="2 state dicts") as failed:
            open_source(path)
        first, second = content
        assert set(failed.value.offenders) == {f"{k}: {len(v)} tensors" for k, v in content.items()}
        assert same(opened(path, first), content[first]) and same(opened(path, second), content[second])
    torch.save({"ema": {"of.model": one}, "v1.0": {"net": two}}, path)
    assert same(opened(path, "ema.of.model"), one) and same(opened(path, "v1.0.net"), two)


def test_parameters_views_and_flags(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    number = torch.randn(3, dtype=torch.complex64)
    content = {
        "parameter": torch.nn.Parameter(whole),
        "part": whole[1:3, 2:4],
        "turned": whole.t(),
        "negative": torch._neg_view(torch.arange(3.0)),
        "conjugated": number.conj(),
        "row": torch.arange(4).expand(1, -1),
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    torch.save(content, tmp_path / "x.pt")
    found = opened(tmp_path / "x.pt")
    assert all(torch.equal(found[name], tensor.detach().resolve_conj()) for name, tensor in content.items())


def sparse() -> Tensor:
    return torch.eye(3).to_sparse()


def without_storage() -> Tensor:
    tensor = torch.ones(4, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


WITHOUT_VALUES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), "meta device"),
    "sparse": (sparse, "sparse"),
    "rows of a sparse one": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised"),
    "no storage": (without_storage, "storage is empty"),
    "far more than the file": (lambda: torch.zeros(1).expand(2**46), "far more than the file's"),
    "more than a number holds": (lambda: torch.zeros(1).expand(2**40, 2**22), "far more than the file's"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WITHOUT_VALUES)
def test_tensors_that_cannot_be_read_are_named(tmp_path: Path, kind: str) -> None:
    make, reason = WITHOUT_VALUES[kind]
    torch.save({**state(), "wrong": make(), "x.wrong": make()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="2 tensors cannot be read") as failed:
        open_source(tmp_path / "x.pt")
    assert [o.partition(":")[0] for o in failed.value.offenders] == ["wrong", "x.wrong"]
    assert all(reason in o for o in failed.value.offenders)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = 0) -> None:
    """A zip file of torch's with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            new = change(name, content)
            if new is not None:
                archive.writestr(name, new)


def test_records_that_are_not_as_torch_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def refused(
        change: Callable[[str, bytes], bytes | None], error: type[Exception], match: str, packed: int = 0
    ) -> None:
        torch.save(state(), path)
        rewritten(path, change, packed)
        with pytest.raises(error, match=match):
            open_source(path)

    refused(lambda name, content: content, MalformedFileError, "compressed", zipfile.ZIP_DEFLATED)
    refused(lambda name, content: None if name.endswith("data/0") else content, InputError, "cannot be read")
    refused(lambda name, content: content[:-1] if name.endswith("data/0") else content, InputError, "cannot be read")
    refused(lambda name, content: b"big" if name.endswith("byteorder") else content, UnsupportedFormatError, "endian")
    refused(lambda name, content: None if name.endswith("data.pkl") else content, MalformedFileError, "no record")
    torch.save(state(), path)
    rewritten(path, lambda name, content: content)  # stored anew by another program: as good as before
    assert same(opened(path), state())


@pytest.mark.parametrize("code", [b"}", b"]", b"(", b"K\x01\x85", b"]q\x00", b"\x8f", b"2", b"h\x00)R"])
def test_a_pickle_takes_no_more_memory_than_it_may(code: bytes) -> None:
    bomb = b"\x80\x02cbuiltins\nset\nq\x00" + code * 200_000
    with pytest.raises(ValueError, match=r"far more than its own size|damaged"):
        unpickle(bomb, 0, 2**20)


def test_calls_that_would_make_much_make_nothing() -> None:
    grown = pickle.dumps(1, 2)[:-1] + b"cbuiltins\nbytearray\nq\x00J\xff\xff\xff\x7f\x85R."
    assert unpickle(grown, 0, 2**16).globals == {"builtins.bytearray"}
    deep = b"\x80\x02" + b")" + b"\x85" * 50_000 + b"}q\x00h\x000."
    assert unpickle(deep, 0, 2**23).content is not None


def test_all_that_a_hostile_pickle_names_is_listed(tmp_path: Path) -> None:
    hostile = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85Rcbuiltins\neval\n."
    torch.save(state(), tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", lambda name, content: hostile if name.endswith("data.pkl") else content)
    with pytest.raises(UnsafePickleError) as failed:
        open_source(tmp_path / "x.pt")
    assert failed.value.offenders == ("builtins.eval", "os.system")


@pytest.mark.parametrize("new", [True, False])
def test_damage_anywhere_is_our_error_or_harmless(tmp_path: Path, new: bool) -> None:
    path, chance = tmp_path / "x.pt", random.Random(0)
    torch.save({"model": state(), "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=new)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(whole)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(chance.randrange(1, 4)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            opened(path)
        except WeightlabError:
            refused += 1
    assert refused > 100
    path.write_bytes(whole[:-3])
    with pytest.raises(MalformedFileError):
        open_source(path)


def test_every_kind_of_dtype_is_as_torch_loads_it(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
    kinds += [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e5m2]
    content: dict[str, Any] = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    for new in (True, False):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        found = opened(tmp_path / "x.pt")
        right = torch.load(tmp_path / "x.pt") if new else content  # torch itself fails on some in the old format
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in right.items())


def test_state_dicts_under_many_names_are_found_once(tmp_path: Path) -> None:
    """Long keys over many entries would make a list of names far larger than the file."""
    inner = {f"{i}": {"nothing": 1} for i in range(20_000)}
    torch.save(
        {"x" * 100_000: inner, "y": {"net": state()}, "z": {f"{i}": inner for i in range(100)}}, tmp_path / "x.pt"
    )
    assert same(opened(tmp_path / "x.pt"), state())


def test_an_old_file_with_a_storage_of_no_known_kind(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content.replace(b"FloatStorage", b"Float8_e4m3"))
    with pytest.raises(InputError):
        open_source(tmp_path / "x.pt")
