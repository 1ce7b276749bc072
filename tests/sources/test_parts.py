"""The lists of a model's parts, as their libraries write them and as someone who means harm would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from weightlab.errors import InputError, MalformedFileError
from weightlab.sources import open_source
from weightlab.sources.local import open_local, owner_of, pickled_parts


def part(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((2, 2), value)}, folder / "model.safetensors")
    return folder


def listing(folder: Path, *paths: Any) -> Path:
    part(folder)
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": "x"} for path in paths]))
    return folder


def names(folder: Path) -> list[str]:
    source = open_source(folder)
    source.close()
    return sorted(source.specs)


@pytest.mark.parametrize(
    "outside", ["../other", "..", ".", "/etc", "a/b", "2_Dense/../..", "a\\b", "a\0b", "a\nb", ".weightlab"]
)
def test_paths_that_lead_elsewhere(tmp_path: Path, outside: str) -> None:
    part(tmp_path / "other")
    model = listing(tmp_path / "model", "", outside)
    with pytest.raises(MalformedFileError, match=r"modules\.json"):
        open_source(model)
    (model / "modules.json").unlink()
    (model / "model_index.json").write_text(json.dumps({outside: ["library", "Model"]}))
    with pytest.raises(MalformedFileError, match=r"model_index\.json"):
        open_source(model)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"idx": 0}]', '[{"path": 3}]', "[" * 10_000, '[{"path": null}]']
)
def test_a_list_that_is_none(tmp_path: Path, content: str) -> None:
    part(tmp_path)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InputError, match=r"modules\.json"):
        open_source(tmp_path)
    assert names(tmp_path / "model.safetensors") == ["w"]  # the file itself is not what is wrong


def test_a_part_that_is_a_link(tmp_path: Path) -> None:
    part(tmp_path / "outside")
    model = listing(tmp_path / "model", "", "2_Dense")
    (model / "2_Dense").symlink_to(tmp_path / "outside")
    with pytest.raises(MalformedFileError, match="symbolic link"):
        open_source(model)


def test_parts_that_are_not_there_have_no_weights(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "1_Pooling", "2_Dense", "2_Dense")
    part(model / "2_Dense")
    part(model / "3_Dense")  # not in the list
    (model / "1_Pooling").mkdir()
    assert names(model) == ["2_Dense/w", "w"]
    done = wl.apply(model, out=tmp_path / "out")
    assert done.left_out == ["3_Dense/model.safetensors"]
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.safetensors")) == [
        "2_Dense/model.safetensors",
        "model.safetensors",
    ]


def test_without_a_root(tmp_path: Path) -> None:
    """Older models keep the network in a folder as well; what lies in the root then is not the model's."""
    model = listing(tmp_path / "model", "0_Transformer", "2_Dense")
    part(model / "0_Transformer")
    part(model / "2_Dense")
    assert names(model) == ["0_Transformer/w", "2_Dense/w"]
    assert wl.apply(model, out=tmp_path / "out").left_out == ["model.safetensors"]


@pytest.mark.parametrize("config", ["router_config.json", "config.json"])
@pytest.mark.parametrize("place", ["", "2_Router"])
def test_the_routes_of_a_router(tmp_path: Path, config: str, place: str) -> None:
    """A Router keeps a folder for each module of each route, in the root where it comes first."""
    model = listing(tmp_path / "model", "", *([place] if place else []))
    routes = {"query": ["query_0_Dense"], "document": ["document_0_Transformer", "document_1_Dense"]}
    folders = [folder for members in routes.values() for folder in members]
    for folder in folders:
        part(model / place / folder)
    tree = {"types": dict.fromkeys(folders, "x.y"), "structure": routes, "parameters": {}}
    (model / place / config).write_text(json.dumps(tree))
    prefix = f"{place}/" if place else ""
    assert names(model) == sorted(["w", *(f"{prefix}{folder}/w" for folder in folders)])
    (model / place / config).write_text(json.dumps({**tree, "types": {"../x": "y"}}))
    with pytest.raises(MalformedFileError, match="not plain names"):
        open_source(model)


def test_routers_in_one_another_end(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "")
    place = model
    for _ in range(6):
        (place / "router_config.json").write_text('{"types": {"r": "x"}, "structure": {}}')
        place = place / "r"
        place.mkdir()
    with pytest.raises(MalformedFileError, match="too deep"):
        open_source(model)


def test_names_of_the_root_that_a_part_has_too(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "2_Dense")
    part(model / "2_Dense")
    save_file({"2_Dense/w": torch.zeros(1)}, model / "model.safetensors")
    with pytest.raises(MalformedFileError, match="one name") as failed:
        open_source(model)
    assert "2_Dense/w" in failed.value.offenders[0]


def test_a_shard_of_a_part_is_missing(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "2_Dense")
    (model / "2_Dense").mkdir()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "2_Dense/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="1 of 1 shards are missing"):
        open_source(model)


def test_whose_part_a_folder_is(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "2_Dense")
    inside = part(model / "2_Dense")
    beside = part(model / "3_Other")
    assert owner_of(inside) == owner_of(inside / "model.safetensors") == model
    assert owner_of(beside) is owner_of(model) is owner_of(model / "model.safetensors") is None
    (model / "modules.json").write_text("[1")  # a list that cannot be used makes no one a part
    assert owner_of(inside) is None


def test_only_the_files_that_are_the_model_have_its_parts(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "2_Dense")
    part(model / "2_Dense")
    save_file({"w": torch.ones(1)}, model / "consolidated.safetensors")
    for file, alone in (("model.safetensors", True), ("consolidated.safetensors", False)):
        source = open_local(model / file)
        assert source.alone is alone and set(source.specs) == {"w"}
        source.close()
    (model / "modules.json").unlink()
    source = open_local(model / "model.safetensors")
    assert not source.alone
    source.close()


def test_parts_that_are_pickles(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", "", "2_Dense")
    (model / "2_Dense").mkdir()
    torch.save({"w": torch.zeros(1)}, model / "2_Dense" / "pytorch_model.bin")
    assert pickled_parts(model) == ["2_Dense/pytorch_model.bin"] and pickled_parts(model / "model.safetensors") == []
    part(model / "2_Dense")  # safetensors win over a pickle beside them
    assert pickled_parts(model) == [] and pickled_parts(model / "2_Dense") == []
