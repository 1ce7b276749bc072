"""Indexes that do not agree with their shards: the index decides, and what it leaves open is refused or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MalformedFileError, MissingInputError, NotPatchableError
from weightlab.sources.local import open_local

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def number(value: float) -> Tensor:
    return torch.full((2, 3), float(value))


def sharded(
    folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str], config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def written(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_of_two_copies_the_one_counts_that_the_index_names(tmp_path: Path) -> None:
    """The copy that loaders would take which read whole shards, the last one, is not in what is written."""
    shards = {A: {"a": number(1), "b": number(2)}, B: {"b": number(9), "c": number(3)}}
    model = sharded(tmp_path / "m", shards, {"a": A, "b": A, "c": B})
    done = wl.apply(model, out=tmp_path / "out")
    found = written(tmp_path / "out")
    assert {file: sorted(tensors) for file, tensors in found.items()} == {A: ["a", "b"], B: ["c"]}
    assert torch.equal(found[A]["b"], number(2)) and torch.equal(found[B]["c"], number(3))
    assert any("several shards" in note and "b" in note for note in done.notes)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"total_size": 72}, "weight_map": {"a": A, "b": A, "c": B}}
    patch = wl.diff(model, {"a": number(1), "b": number(5), "c": number(3)})
    with pytest.raises(NotPatchableError, match="several shards") as failed:
        wl.apply(model, patch, in_place=True)
    assert failed.value.offenders == ("b",)
    wl.apply(model, patch, out=tmp_path / "patched")
    assert torch.equal(written(tmp_path / "patched")[A]["b"], number(5))


def test_a_shard_of_which_nothing_counts_is_left_out(tmp_path: Path) -> None:
    shards = {A: {"a": number(1), "b": number(2)}, B: {"b": number(9)}}
    model = sharded(tmp_path / "m", shards, {"a": A, "b": A})
    (model / B).unlink()
    wl.apply(model, out=tmp_path / "out")
    assert list(written(tmp_path / "out")) == [A]


def test_tensors_that_the_index_does_not_name(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m", {A: {"a": number(1), "old": number(7)}, B: {"b": number(2)}}, {"a": A, "b": B})
    assert set(open_local(model).specs) == {"a", "b"}
    done = wl.apply(model, out=tmp_path / "out")
    assert {n for tensors in written(tmp_path / "out").values() for n in tensors} == {"a", "b"}
    assert [note for note in done.notes if f"old (in {A})" in note]
    assert any("old" in note for note in wl.inspect(model).notes)
    # In place the file stays as it is beside what is patched, and comes back bit for bit.
    before = (model / A).read_bytes()
    patch = wl.diff(model, {"a": number(4), "b": number(2)}, tmp_path / "p.safetensors")
    wl.apply(model, patch, in_place=True)
    assert torch.equal(load_file(model / A)["a"], number(4)) and torch.equal(load_file(model / A)["old"], number(7))
    wl.remove(model, patch)
    assert (model / A).read_bytes() == before


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    model = sharded(
        tmp_path / "m", {A: {"a": number(1)}, B: {"b": number(2), "c": number(3)}}, {"a": A, "b": B, "c": A}
    )
    done = wl.apply(model, out=tmp_path / "out")
    assert torch.equal(written(tmp_path / "out")[B]["c"], number(3))
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]["c"] == B
    assert any(f"c (in {B})" in note for note in done.notes)


@pytest.mark.parametrize(
    ("name", "config", "read"),
    [
        ("lm_head.weight", {"tie_word_embeddings": True}, True),
        ("lm_head.weight", {}, True),
        ("language_model.lm_head.weight", {"text_config": {"tie_word_embeddings": True}}, True),
        ("lm_head.weight", {"tie_word_embeddings": False}, False),
        ("lm_head.weight", {"text_config": {"tie_word_embeddings": False}}, False),
        ("layers.0.weight", {"tie_word_embeddings": True}, False),
    ],
)
def test_tensors_that_no_shard_has(tmp_path: Path, name: str, config: dict[str, Any], read: bool) -> None:
    shards = {A: {"embed_tokens.weight": number(1)}, B: {"b": number(2)}}
    model = sharded(tmp_path / "m", shards, {"embed_tokens.weight": A, "b": B, name: B}, config)
    if not read:
        with pytest.raises(MalformedFileError, match="disagree") as failed:
            open_local(model)
        assert failed.value.offenders == (f"{name}: not in {B}",)
        return
    done = wl.apply(model, out=tmp_path / "out")
    assert name not in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert any(name in note for note in done.notes)


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    shards = {A: {"a": number(1), "b": number(2)}, B: {"b": number(3), "c": number(4)}}
    third = "model-00003-of-00003.safetensors"
    model = sharded(tmp_path / "m", shards, {"a": A, "b": third, "c": B, "d": A})
    save_file({"e": number(5)}, model / third)
    with pytest.raises(MalformedFileError, match="disagree") as failed:
        open_local(model)
    assert failed.value.offenders == (f"b: not in {third}, and in {A} and {B}", f"d: not in {A}")


def test_an_index_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="names no tensor"):
        open_local(sharded(tmp_path / "m", {A: {"a": number(1)}}, {}))


def test_shards_without_their_index(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m", {A: {"a": number(1)}, B: {"b": number(2)}}, {"a": A, "b": B})
    (model / INDEX).unlink()
    for left in ((A, B), (A,)):  # one of two is no model either
        with pytest.raises(MissingInputError, match="without the index") as failed:
            open_local(model)
        assert failed.value.offenders == left and INDEX in f"model{failed.value.remedy}".replace("*", "model")
        (model / B).unlink(missing_ok=True)
    assert set(open_local(model / A).specs) == {"a"}  # whoever names the file means it
    (model / A).rename(model / "model-00001-of-00001.safetensors")
    assert set(open_local(model).specs) == {"a"}


def test_stale_sets_beside_that_of_the_index(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m", {A: {"a": number(1)}, B: {"b": number(2)}}, {"a": A, "b": B})
    stale = ["model-00001-of-00001.safetensors", "model-00003-of-00003.safetensors", "model.safetensors"]
    for name in stale:
        save_file({"a": number(9)}, model / name)
    done = wl.apply(model, out=tmp_path / "out")
    assert sorted(done.left_out) == stale and list(written(tmp_path / "out")) == [A, B]
    done = wl.apply(model, wl.diff(model, {"a": number(3), "b": number(2)}), in_place=True)
    assert [note.split()[2].rstrip(",") for note in done.notes if note.startswith("not changed")] == stale


@pytest.mark.parametrize(
    ("files", "model"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"], None),
        (["consolidated.safetensors", "adapter_model.safetensors"], "consolidated.safetensors"),
        (["other.safetensors", "non_lora_trainables.bin"], "other.safetensors"),
    ],
)
def test_which_of_several_files_is_the_model(tmp_path: Path, files: list[str], model: str | None) -> None:
    for index, name in enumerate(files):
        save_file({"w": number(index)}, tmp_path / name)
    source = open_local(tmp_path)
    assert list(source.headers) == [model or files[0]]
    source.close()


def test_a_variant_does_not_stand_for_a_pickle_that_is_the_model(tmp_path: Path) -> None:
    from weightlab.sources import open_source
    from weightlab.sources.pickled import PickledSource

    save_file({"w": number(1).half()}, tmp_path / "model.fp16.safetensors")
    torch.save({"w": number(2)}, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert isinstance(source, PickledSource) and source.specs["w"].dtype == "F32"
