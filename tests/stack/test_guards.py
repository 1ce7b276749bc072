"""What may be changed in place, one reason at a time; and what is on keeps coming off when a reason comes later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from weightlab.errors import IntegrityError, MissingInputError, NotPatchableError
from weightlab.files.folder import open_folder
from weightlab.stack.guards import folder_of, place_of, recorded

Make = Callable[[Path], Path]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = json.dumps([{"path": "", "type": "a"}, {"path": "2_Dense", "type": "b"}])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.ones(4)}, folder / FILE)
    return folder


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """Adds 1 to `w`."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        save_file({"w": torch.full((4,), value)}, tmp_path / f"{name}.safetensors")
    wl.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "p.safetensors", encode="dense")
    return tmp_path / "p.safetensors"


def anchor(path: Path) -> str:
    with open_folder(folder_of(path)) as checkpoint:
        return place_of(path, checkpoint).anchor


def dense(folder: Path, *, pickled: bool) -> None:
    folder.mkdir()
    if pickled:
        torch.save({"w": torch.zeros(2)}, folder / "pytorch_model.bin")
    else:
        save_file({"w": torch.zeros(2)}, folder / FILE)


def larger(folder: Path) -> Path:
    """The file becomes one shard of an index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": FILE}}))
    return folder / FILE


def pickles(folder: Path) -> Path:
    (folder / "modules.json").write_text(PARTS)
    dense(folder / "2_Dense", pickled=True)
    return folder / FILE


def part(folder: Path) -> Path:
    """The folder becomes a part of the one above."""
    (folder.parent / "modules.json").write_text(json.dumps([{"path": folder.name, "type": "a"}]))
    return folder


LATER = [
    (larger, "one shard of a larger checkpoint", (INDEX,)),
    (pickles, "parts of it are pickles", ("2_Dense/pytorch_model.bin",)),
    (part, "one part of a larger model", ()),
]


@pytest.mark.parametrize(("make", "says", "names"), LATER)
def test_refused_where_nothing_is_on(model: Path, patch: Path, make: Make, says: str, names: tuple[str, ...]) -> None:
    assert anchor(model) == anchor(model / FILE) == FILE
    path = make(model)
    before = {f: f.read_bytes() for f in model.rglob("*") if f.is_file()}
    with pytest.raises(NotPatchableError, match=says) as failed:
        wl.apply(path, patch, in_place=True)
    assert failed.value.offenders == names
    assert {f: f.read_bytes() for f in model.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(("make", "says", "names"), LATER)
def test_what_is_on_comes_off(model: Path, patch: Path, make: Make, says: str, names: tuple[str, ...]) -> None:
    clean = (model / FILE).read_bytes()
    wl.apply(model, patch, in_place=True)
    assert load_file(model / FILE)["w"].tolist() == [2.0] * 4
    path = make(model)
    assert anchor(path) == FILE
    wl.remove(path, everything=True)
    assert (model / FILE).read_bytes() == clean
    with pytest.raises(NotPatchableError, match=says):
        anchor(path)


def test_an_index_of_other_files_is_no_reason(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"w": "other.safetensors"}}))
    assert anchor(model / FILE) == FILE


def test_a_part_that_is_no_pickle_is_no_reason(model: Path) -> None:
    (model / "modules.json").write_text(PARTS)
    dense(model / "2_Dense", pickled=False)
    assert anchor(model) == FILE


@pytest.mark.parametrize(
    ("place", "cached"),
    [
        ("models--o--n/snapshots/0123", True),
        ("models--o--n/snapshots", True),
        ("snapshots/models--o--n/copy", False),
        ("models--o--n/mine", False),
        ("my-models--o--n/snapshots/0123", False),
    ],
)
def test_what_is_the_hubs_cache(tmp_path: Path, place: str, cached: bool) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(4)}, folder / FILE)
    if cached:
        with pytest.raises(NotPatchableError, match="a snapshot in the Hub's cache"):
            anchor(folder)
    else:
        assert anchor(folder) == FILE


def test_what_is_no_checkpoint_of_that_kind(model: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file or folder"):
        anchor(model / "nothing.safetensors")
    (model / FILE).unlink()
    torch.save({"w": torch.ones(4)}, model / "pytorch_model.bin")
    with pytest.raises(NotPatchableError, match="only safetensors checkpoints"):
        anchor(model)


def test_which_record_is_meant(model: Path, patch: Path) -> None:
    save_file({"w": torch.zeros(4)}, model / "other.safetensors")
    with open_folder(model) as checkpoint:
        assert recorded(model, checkpoint) is None
        for name in ("other.safetensors", FILE):
            wl.apply(model / name, patch, in_place=True)
        for path, meant in ((model, FILE), (model / FILE, FILE), (model / "other.safetensors", "other.safetensors")):
            found = recorded(path, checkpoint)
            assert found is not None and found[0].anchor == meant and len(found[1].patches) == 1
        assert recorded(model / "nothing.safetensors", checkpoint) is None
        (model / "other.safetensors").unlink()
        for path in (model, model / "other.safetensors"):  # one that is gone comes first: it has to be told
            gone = recorded(path, checkpoint)
            assert gone is not None and gone[0].anchor == "other.safetensors"
        kept = recorded(model / FILE, checkpoint)
        assert kept is not None and kept[0].anchor == FILE
        with pytest.raises(IntegrityError, match="cannot be taken off") as failed:
            place_of(model, checkpoint)
        assert failed.value.offenders == ("other.safetensors: not there any more",)
        assert place_of(model / FILE, checkpoint).anchor == FILE
