"""Patch files as they lie on disk: layout, shards, room for headers, many and strange tensors, nothing left behind."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import weightlab as wl
from tests.patches.tools import make, read, state
from weightlab.errors import InputError, NotPatchableError, StorageError, UsageError
from weightlab.patches import layout, writer
from weightlab.patches.patch import Patch, open_patch

ENCODINGS = ["exact", "dense", "dense:bf16", "quantized:4", "sparse:0.2", "low_rank:2", "sign"]


def entries(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("encode", ENCODINGS)
def test_any_reader_can_open_it(tmp_path: Path, encode: str) -> None:
    patch = make(tmp_path / "p.safetensors", encode)
    listed = {p.entry for r in patch.records.values() for p in r.parts.values()}
    assert set(load_file(tmp_path / "p.safetensors")) == listed
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "weightlab"}


@pytest.mark.parametrize("encode", ENCODINGS)
def test_parts_are_aligned_and_the_header_fits(tmp_path: Path, encode: str) -> None:
    make(tmp_path / "p.safetensors", encode)
    container, _, data = read(tmp_path / "p.safetensors")
    sizes = {"F32": 4, "BF16": 2, "U32": 4, "U16": 2, "U8": 1}
    for entry in container.values():
        assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0
    assert (tmp_path / "p.safetensors").stat().st_size - len(data) < 1000 * (len(container) + 3)


@pytest.mark.parametrize("encode", ENCODINGS)
def test_shards_are_the_same_patch(tmp_path: Path, encode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tmp_path / "p.safetensors", encode, notes="one file")
    single = make(tmp_path / "folder", encode)
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["patch.safetensors"]
    monkeypatch.setattr(layout, "SHARD_BYTES", 200)
    sharded = make(tmp_path / "shards", encode, notes="several")
    files = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert len(files) > 2 and files[-1] == "patch.safetensors.index.json"
    assert whole.id == single.id == sharded.id and whole == sharded
    assert whole.header.model_copy(update={"notes": "several"}) == sharded.header
    sharded.verify()
    index = json.loads((tmp_path / "shards" / files[-1]).read_text())
    assert index["weight_map"] == {e: f for f in files[:-1] for e in entries(tmp_path / "shards" / f)}
    assert index["metadata"]["weightlab_id"] == whole.id
    bases = {name: tensor.clone() for name, tensor in state().items()}
    one, other = wl.apply(bases, whole), wl.apply(bases, sharded)
    assert all(torch.equal(one[name], other[name]) for name in bases)


def test_each_shard_describes_its_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    patch = make(tmp_path / "shards", "dense")
    seen: list[str] = []
    for path in sorted((tmp_path / "shards").glob("*.safetensors")):
        container, header, _ = read(path)
        assert sorted(container) == sorted(f"{name}::delta" for name in header["tensors"])
        assert header["shard"]["id"] == patch.id and header["shard"]["count"] == len(patch.files) - 1
        seen += header["tensors"]
    assert sorted(seen) == sorted(patch.records)


def test_nothing_changed(tmp_path: Path) -> None:
    for place in ("p.safetensors", "folder"):
        patch = wl.diff(state(), state(), tmp_path / place)
        assert dict(patch.records) == {} and patch.nbytes() == 0
        assert patch.header.base.fingerprint is not None and patch.header.result is not None
        assert patch.header.base.fingerprint == patch.header.result.fingerprint
        patch.verify()
        assert all(torch.equal(t, state()[n]) for n, t in wl.apply(state(), patch).items())


def test_no_tensors_at_all(tmp_path: Path) -> None:
    patch = wl.diff({}, {}, tmp_path / "p.safetensors")
    assert dict(patch.records) == {}
    patch.verify()


def test_only_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {name: tensor for name, tensor in state().items() if name == "steps"}
    for place in ("p.safetensors", "folder"):
        patch = wl.diff(state(), tuned, tmp_path / place, allow=["removed"])
        assert {r.encoding for r in patch.records.values()} == {"removed"} and len(patch.records) == 5
        assert patch.nbytes() == 0 and patch.header.requires == ["removed"]
        assert patch.header.result is not None and patch.header.base.fingerprint != patch.header.result.fingerprint
        patch.verify()
    everything = wl.diff(state(), {}, tmp_path / "all.safetensors", allow=["removed"])
    nothing = wl.diff({}, {})
    assert everything.header.result == nothing.header.result and len(everything.records) == 6
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    tuned = {name: tensor + 1 for name, tensor in state().items() if name != "steps"}
    sharded = wl.diff(state(), tuned, tmp_path / "shards", encode="dense", allow=["removed"])
    assert len(sharded.files) > 2 and sharded.records["steps"].encoding == "removed"


def test_many_small_tensors(tmp_path: Path) -> None:
    """Ten thousand: one file's header would be beyond 20 MB with names of this length, so a folder gets shards."""
    name = "model.language_model." + "a_rather_long_name_of_a_module." * 10
    base = {f"{name}{i}": torch.tensor([1.0]) for i in range(10_000)}
    tuned = {f"{name}{i}": torch.tensor([2.0]) for i in range(10_000)}
    patch = wl.diff(base, tuned, tmp_path / "folder", encode="dense")
    assert len(patch.files) > 2
    for path in patch.files.values():
        assert path.stat().st_size < 25_000_000
    assert len(patch.records) == 10_000 and patch.nbytes() == 40_000
    patch.verify()


def test_a_header_beyond_the_formats_limit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_HEADER", 3000)
    with pytest.raises(UsageError, match=r"give the output a name without \.safetensors"):
        make(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        " ",
        "a::b",
        "::",
        "../up",
        "/root",
        "a/b\\c",
        "é漢😀",
        '"quoted"\\',
        "x" * 5000,
        "\\" * 300,
        "__metadata__x",
    ],
)
@pytest.mark.parametrize("place", ["p.safetensors", "folder"])
def test_strange_names(tmp_path: Path, name: str, place: str) -> None:
    base, tuned = {name: torch.zeros(3), "other": torch.zeros(3)}, {name: torch.ones(3), "other": torch.ones(3)}
    patch = wl.diff(base, tuned, tmp_path / place)
    assert set(patch.records) == {name, "other"}
    patch.verify()
    assert torch.equal(wl.apply(base, open_patch(tmp_path / place))[name], torch.ones(3))


@pytest.mark.parametrize("name", ["", "tab\t", "new\nline", "\0", "bell\x07", "\x01" * 300, "\x1b[2J", "half \ud800"])
def test_what_is_no_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    base, tuned = {name: torch.zeros(3), "other": torch.zeros(3)}, {name: torch.ones(3), "other": torch.ones(3)}
    with pytest.raises(InputError, match="no names of tensors") as failed:
        wl.diff(base, tuned, tmp_path / "p.safetensors")
    assert failed.value.offenders == (repr(name),) and failed.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_names_that_could_be_taken_for_one_another(tmp_path: Path) -> None:
    names = ["w", "w::delta", "w::delta::delta", "w::data"]
    base: dict[str, Tensor] = {name: torch.zeros(i + 1) for i, name in enumerate(names)}
    tuned = {name: tensor + i + 1 for i, (name, tensor) in enumerate(base.items())}
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors", encode="dense")
    got = wl.apply(base, patch)
    assert all(torch.equal(got[name], tuned[name]) for name in names)


def test_output_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    file, folder = tmp_path / "p.safetensors", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for place in (file, folder):
        with pytest.raises(NotPatchableError, match="exists already"):
            make(place)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "mine", "p.safetensors"]
    assert file.read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert isinstance(make(tmp_path / "folder"), Patch)


def test_a_file_size_limit_is_told_and_nothing_stays(tmp_path: Path) -> None:
    base = {"w": torch.zeros(300_000)}
    tuned = {"w": torch.randn(300_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        for encode in ("dense", "exact", "sparse:0.9"):
            with pytest.raises(StorageError) as caught:
                wl.diff(
                    {"w": base["w"].reshape(3, -1)},
                    {"w": tuned["w"].reshape(3, -1)},
                    tmp_path / "p.safetensors",
                    encode=encode,
                )
            assert caught.value.exit_code == 7
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
