"""Safetensors folders: shards, indexes, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weightlab.errors import InputError, MalformedFileError, MissingInputError, UnsupportedFormatError
from weightlab.sources import Source, open_source
from weightlab.sources.local import open_local

INDEX = "model.safetensors.index.json"


def tensors(count: int = 4) -> dict[str, Tensor]:
    return {f"w.{i}": torch.full((2, 3), float(i)) for i in range(count)}


def sharded(folder: Path, shards: dict[str, list[str]], weight_map: Any = None, index: str = INDEX) -> Path:
    """A folder with shards {file: names}; the index is right unless one is given."""
    folder.mkdir(exist_ok=True)
    state = tensors()
    for file, names in shards.items():
        save_file({n: state[n] for n in names}, folder / file)
    right = {n: f for f, names in shards.items() for n in names}
    content = {"metadata": {"total_size": 1}, "weight_map": right if weight_map is None else weight_map}
    (folder / index).write_text(json.dumps(content))
    return folder


def read(source: Source, name: str) -> Tensor:
    spec = source.specs[name]
    out = torch.empty(spec.nbytes, dtype=torch.uint8)
    source.read(name, 0, out)
    assert spec.type.torch is not None
    return out.view(spec.type.torch).reshape(spec.shape)


TWO = {"model-1.safetensors": ["w.0", "w.2"], "model-2.safetensors": ["w.1", "w.3"]}


@pytest.mark.parametrize("as_what", ["file", "folder", "other name", "shards", "the index"])
def test_all_that_is_a_checkpoint(tmp_path: Path, as_what: str) -> None:
    place = tmp_path / "m"
    place.mkdir()
    if as_what in ("shards", "the index"):
        sharded(place, TWO)
    else:
        save_file(tensors(), place / ("weights.safetensors" if as_what == "other name" else "model.safetensors"))
    path = {"file": place / "model.safetensors", "the index": place / INDEX}.get(as_what, place)
    source = open_source(path)
    assert set(source.specs) == set(tensors())
    assert all(torch.equal(read(source, n), t) for n, t in tensors().items())
    out = torch.empty(8, dtype=torch.uint8)
    source.read("w.3", 4, out)  # a range of bytes
    assert out.view(torch.float32).tolist() == [3.0, 3.0]
    assert source.label == str(path) and source.aliases == {} and source.opaque == frozenset()
    source.close()


def test_only_the_files_of_the_index_count(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", TWO)
    save_file({"other": torch.zeros(2)}, folder / "consolidated.safetensors")
    save_file({"w.0": torch.zeros(2)}, folder / "adapter_model.safetensors")
    source = open_source(folder)
    assert set(source.specs) == set(tensors())
    source.close()


def test_the_usual_name_wins_over_others(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    source = open_source(tmp_path)
    assert set(source.specs) == set(tensors())
    source.close()
    (tmp_path / "model.safetensors").rename(tmp_path / "third.safetensors")
    with pytest.raises(MalformedFileError, match="2 files could be the model") as failed:
        open_source(tmp_path)
    assert failed.value.offenders == ("consolidated.safetensors", "third.safetensors")


@pytest.mark.parametrize(
    "outside", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "a\0b"]
)
def test_an_index_that_points_outside_its_folder(tmp_path: Path, outside: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    folder = sharded(
        tmp_path / "m", TWO, {**dict.fromkeys(TWO["model-1.safetensors"], "model-1.safetensors"), "w.1": outside}
    )
    with pytest.raises(MalformedFileError, match="points outside its folder") as failed:
        open_source(folder)
    assert failed.value.offenders == (repr(outside),)


def test_all_missing_shards_are_listed(tmp_path: Path) -> None:
    folder = sharded(
        tmp_path / "m", TWO, {"w.0": "model-1.safetensors", "w.1": "gone-1.safetensors", "w.2": "gone-2.safetensors"}
    )
    with pytest.raises(MissingInputError, match="2 of 3 shards are missing") as failed:
        open_source(folder)
    assert failed.value.offenders == ("gone-1.safetensors", "gone-2.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    sharded(tmp_path / "m", TWO)
    (tmp_path / "m" / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(MalformedFileError, match="index"):
        open_source(tmp_path / "m")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", TWO)
    os.truncate(folder / "model-2.safetensors", 50)
    with pytest.raises(MalformedFileError, match=r"model-2\.safetensors"):
        open_source(folder)


def nothing(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")


def distributed(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"x")
    (folder / ".metadata").write_bytes(b"x")


def gguf(folder: Path) -> None:
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (nothing, MissingInputError, "no checkpoint found"),
        (distributed, UnsupportedFormatError, "distributed checkpoint"),
        (gguf, UnsupportedFormatError, "GGUF"),
    ],
)
def test_what_is_no_checkpoint_or_one_that_is_not_read(
    tmp_path: Path, make: Callable[[Path], None], error: type[InputError], says: str
) -> None:
    make(tmp_path)
    with pytest.raises(error, match=says) as failed:
        open_source(tmp_path)
    assert failed.value.exit_code == 3
    with pytest.raises(MissingInputError, match="no such file"):
        open_source(tmp_path / "nowhere")


FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("config", "extra", "opaque"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {"layer.weight": FP8}, {"layer.weight"}),
        ({"quantization_config": {"quant_method": "another"}}, {}, {"w.0", "w.1", "w.2", "w.3"}),
        ({}, {"layer.weight": FP8}, set()),
        (
            {},
            {"layer.weight": FP8, "layer.weight_scale_inv": torch.ones(1)},
            {"layer.weight", "layer.weight_scale_inv"},
        ),
    ],
)
def test_codes_have_no_sums(tmp_path: Path, config: dict[str, Any], extra: dict[str, Tensor], opaque: set[str]) -> None:
    save_file(tensors() | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_local(tmp_path)
    assert source.opaque == set(source.codes) == opaque
    source.close()


def test_integers_have_no_sums_either(tmp_path: Path) -> None:
    save_file(tensors() | {"steps": torch.tensor(3), "mask": torch.tensor([True])}, tmp_path / "model.safetensors")
    source = open_local(tmp_path)
    assert source.opaque == {"steps", "mask"}
    source.close()
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(MalformedFileError, match=r"config\.json"):
        open_local(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    from weightlab.errors import IntegrityError

    save_file(tensors(), tmp_path / "model.safetensors")
    source = open_local(tmp_path)
    read(source, "w.0")
    os.truncate(tmp_path / "model.safetensors", source.headers["model.safetensors"].data_start + 5)
    with pytest.raises(IntegrityError):
        read(source, "w.3")
    source.close()
