"""Pickled checkpoints: found wherever they nest, and never run."""

from __future__ import annotations

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightlab as wl
from tests.sources.test_local import read
from weightlab.errors import InputError, MalformedFileError, MissingInputError, UnsafePickleError
from weightlab.sources import cautions_of, open_source


def state() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1, 2]), "scalar": torch.tensor(0.5)}


def opened(path: Path, key: str | None = None) -> dict[str, Tensor]:
    source = open_source(path, key)
    found = {n: read(source, n) for n in source.specs}
    source.close()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("new", [True, False])
def test_files_of_either_format(tmp_path: Path, suffix: str, new: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(collections.OrderedDict(state()), path, _use_new_zipfile_serialization=new)
    assert same(opened(path), state())
    if suffix != ".pth.tar":
        path.rename(tmp_path / ("pytorch_model.bin" if suffix == ".bin" else path.name))
        assert same(opened(tmp_path), state())


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1, "state": {"x": torch.zeros(3)}}},
        lambda s: {"model": {"state_dict": s, "config": {"width": 4}}, "ema": {"decay": 0.9}},
        lambda s: {"model_state_dict": s},
    ],
)
def test_nested_state_dicts_are_found(tmp_path: Path, nest: Any) -> None:
    torch.save(nest(state()), tmp_path / "x.pt")
    assert same(opened(tmp_path / "x.pt"), state())


def test_tensors_beside_the_only_state_dict_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({**state(), "head": {"w": torch.ones(2)}}, path)
    with pytest.raises(InputError, match="tensors lie beside head, which has 1 more") as caught:
        opened(path)
    assert caught.value.offenders == tuple(state()) and "--key head" in caught.value.remedy
    assert same(opened(path, "head"), {"w": torch.ones(2)})  # the user's choice
    torch.save({"net": {"inner": {"a": state(), "x": torch.ones(1)}}}, path)
    with pytest.raises(InputError, match=r"beside net\.inner\.a") as caught:
        opened(path)
    assert caught.value.offenders == ("net.inner.x",)


def test_tensors_beside_a_state_dict_under_a_usual_key_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"state_dict": state(), "mean": torch.ones(3)}, path)
    source = open_source(path)
    assert set(source.specs) == set(state())
    assert any("left out: mean" in caution for caution in cautions_of(source))
    source.close()


def test_a_key_names_one(tmp_path: Path) -> None:
    other = {"z": torch.ones(2)}
    torch.save({"model": state(), "state_dict": other, "ema": {"shadow": other}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="2 state dicts") as failed:
        open_source(tmp_path / "x.pt")
    assert "--key" in failed.value.remedy and "ema" in failed.value.remedy
    assert same(opened(tmp_path / "x.pt", "model"), state())
    assert same(opened(tmp_path / "x.pt", "ema.shadow"), other)
    for key in ("ema", "nowhere", "model.a.weight", ""):
        with pytest.raises(InputError, match="no state dict at --key"):
            open_source(tmp_path / "x.pt", key)


@pytest.mark.parametrize(
    "content", [5, [torch.zeros(2)], {}, {"a": 1}, torch.zeros(3), {"model": {"a": "b"}}, {1: torch.zeros(2)}]
)
def test_what_holds_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no state dict"):
        open_source(tmp_path / "x.pt")


class _Runs:
    """A pickle that makes a file when it is opened by someone who trusts it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, new: bool) -> None:
    mark = tmp_path / "it ran"
    torch.save({"a": torch.zeros(2), "b": _Runs(mark)}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UnsafePickleError, match="wants to run code") as failed:
        open_source(tmp_path / "x.pt")
    assert failed.value.exit_code == 3 and not mark.exists()
    (tmp_path / "y.bin").write_bytes(pickle.dumps(_Runs(mark), protocol=2))
    with pytest.raises(InputError):
        open_source(tmp_path / "y.bin")
    assert not mark.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # so the test can fail
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04 not a zip", os.urandom(1000), b"\x80\x02}q\x00."])
def test_files_that_are_no_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError):
        open_source(tmp_path / "x.bin")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", 900)
    with pytest.raises(MalformedFileError):
        open_source(tmp_path / "x.pt")


def test_one_storage_under_two_names_is_one_tensor(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    torch.save({"embed": shared, "head": shared, "part": shared[:2], "turned": shared.t()}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert source.aliases == {"head": "embed"} and set(source.specs) == {"embed", "part", "turned"}
    assert torch.equal(read(source, "turned"), shared.t())
    source.close()
    tuned = {n: t + 1 for n, t in {"embed": shared, "head": shared, "part": shared[:2], "turned": shared.t()}.items()}
    patch = wl.diff(tmp_path / "x.pt", tuned | {"head": tuned["embed"]}, encode="dense:fp32")
    wl.apply(tmp_path / "x.pt", patch, out=tmp_path / "new")
    assert torch.allclose(opened(tmp_path / "new")["embed"], tuned["embed"])


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map: Any = None) -> None:
    for file, names in shards.items():
        torch.save({n: state()[n] for n in names}, folder / file)
    right = {n: f for f, names in shards.items() for n in names}
    content = {"weight_map": right if weight_map is None else weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.bin": ["a.weight"], "b.bin": ["scalar", "b.bias"]})
    assert same(opened(tmp_path), state())


@pytest.mark.parametrize(
    ("weight_map", "error", "says"),
    [
        ({"a.weight": "../a.bin"}, MalformedFileError, "not plain names"),
        ({"a.weight": 3}, MalformedFileError, "valid string, not 3"),
        ({"a.weight": "gone.bin"}, MissingInputError, "1 of 1 shards are missing"),
        ({"a.weight": "a.bin", "more": "a.bin"}, MalformedFileError, "disagree"),
        ({"a.weight": "a.bin", "b.bias": "a.bin", "scalar": "b.bin"}, MalformedFileError, "disagree"),
        ([], MalformedFileError, "weight_map"),
        ({"a.weight": ["a.bin"]}, MalformedFileError, "weight_map"),
    ],
)
def test_shards_that_do_not_fit_their_index(
    tmp_path: Path, weight_map: Any, error: type[InputError], says: str
) -> None:
    write_shards(tmp_path, {"a.bin": ["a.weight"], "b.bin": ["scalar", "b.bias"]}, weight_map)
    with pytest.raises(error, match=says):
        open_source(tmp_path)


def test_which_of_several_files_is_asked(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "one.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "optimizer.pt")
    assert same(opened(tmp_path), state())
    torch.save(state(), tmp_path / "two.pt")
    with pytest.raises(MalformedFileError, match="2 files could be the model"):
        open_source(tmp_path)
