"""The same bytes under two names: what went on under one is seen under the other, and never taken for clean."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content

INDEX = "model.safetensors.index.json"


def index(path: str, file: str) -> None:
    Path(path).write_text(json.dumps({"metadata": {}, "weight_map": {"w": file}}))


def beside() -> tuple[str, str, str]:
    """An index comes beside a patched file."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    index(f"m/{INDEX}", "model.safetensors")
    return "m", "m/model.safetensors", "m/model.safetensors"


def two_indexes() -> tuple[str, str, str]:
    """Two indexes share a shard."""
    shutil.copy("clean.safetensors", "m/s.safetensors")
    for name in "xy":
        index(f"m/{name}.safetensors.index.json", "s.safetensors")
    wl.apply("m/x.safetensors.index.json", "p.safetensors", in_place=True)
    return "m/y.safetensors.index.json", "m/x.safetensors.index.json", "m/s.safetensors"


def linked() -> tuple[str, str, str]:
    """A model whose file is a link to a patched one."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.mkdir("other")
    os.symlink("../m/model.safetensors", "other/model.safetensors")
    return "other", "m/model.safetensors", "m/model.safetensors"


def module() -> tuple[str, str, str]:
    """One module of a model in folders, whose index lies above."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.mkdir("m/inner")
    os.rename("m/model.safetensors", "m/inner/model.safetensors")
    record = Path("m/.weightlab/model.safetensors.stack/stack.json")
    record.write_text(record.read_text().replace('"model.safetensors"', '"inner/model.safetensors"'))
    return "m/inner", "m/model.safetensors", "m/inner/model.safetensors"


def without_index() -> tuple[str, str, str]:
    """The index of a patched model is gone and its shard is named."""
    shutil.copy("clean.safetensors", "m/s.safetensors")
    index(f"m/{INDEX}", "s.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.unlink(f"m/{INDEX}")
    return "m/s.safetensors", f"m/{INDEX}", "m/s.safetensors"


def renamed() -> tuple[str, str, str]:
    """A patched file has another name now."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.rename("m/model.safetensors", "m/mine.safetensors")
    return "m/mine.safetensors", "m/model.safetensors", "m/mine.safetensors"


def renamed_shard() -> tuple[str, str, str]:
    """A patched shard has another name now, and the index is there."""
    shutil.copy("clean.safetensors", "m/s.safetensors")
    index(f"m/{INDEX}", "s.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.rename("m/s.safetensors", "m/mine.safetensors")
    return "m/mine.safetensors", f"m/{INDEX}", "m/mine.safetensors"


def second_name() -> tuple[str, str, str]:
    """A hard link of a patched file in the same folder."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    wl.apply("m", "p.safetensors", in_place=True)
    os.link("m/model.safetensors", "m/second.safetensors")
    return "m/second.safetensors", "m/model.safetensors", "m/second.safetensors"


Makes = Callable[[], tuple[str, str, str]]
WHOLE = [beside, two_indexes, linked]
GONE = [without_index, renamed, renamed_shard, module]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `clean.safetensors`, patches `p` (+1) and `q` (×3) of it, and an empty folder `m`."""
    monkeypatch.chdir(tmp_path)
    base = {"w": torch.ones(4, 4)}
    save_file(base, "clean.safetensors")
    wl.diff(base, {"w": base["w"] + 1}, "p.safetensors", encode="dense")
    wl.diff(base, {"w": base["w"] * 3}, "q.safetensors", encode="dense")
    os.mkdir("m")
    return tmp_path


@pytest.mark.parametrize("make", [*WHOLE, *GONE, second_name])
def test_no_reader_takes_it_for_clean(weightlab: Weightlab, place: Path, make: Makes) -> None:
    other, anchor, file = make()
    before = content(place)
    for words in (
        ("apply", other, "p.safetensors", "--in-place"),
        ("apply", other, "q.safetensors", "--in-place", "--dry-run"),
        ("apply", other, "q.safetensors", "--in-place", "--links", "copy"),
        ("apply", other, "q.safetensors", "-o", "out"),
        ("apply", other, "-o", "out"),
        ("remove", other, "--all"),
        ("scale", other, "p.safetensors", "2"),
        ("verify", other),
    ):
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended.out, ended.err)
        assert "went on under another name" in ended.err
        assert f"recorded for {place / anchor}" in ended.err
        assert f"weightlab remove {place / anchor} --" in ended.err.splitlines()[-1]
    ended = weightlab("status", other)
    assert ended.code == 5 and "p.safetensors" in ended.out and "another name" in ended.out
    assert content(place) == before
    assert load_file(file)["w"].tolist() == [[2.0] * 4] * 4


@pytest.mark.parametrize("make", WHOLE)
def test_it_comes_off_where_it_went_on(weightlab: Weightlab, place: Path, make: Makes) -> None:
    other, anchor, file = make()
    assert weightlab("verify", anchor).code == 0
    assert weightlab("status", anchor).code == 0
    assert weightlab("remove", anchor, "--all").code == 0
    assert Path(file).read_bytes() == Path("clean.safetensors").read_bytes()
    assert weightlab("status", other).code == 0
    if make is not linked:
        assert weightlab("apply", other, "q.safetensors", "--in-place").code == 0
        assert load_file(file)["w"].tolist() == [[3.0] * 4] * 4


def test_a_second_name_comes_off_with_a_copy(weightlab: Weightlab, place: Path) -> None:
    """As the messages say, one after the other."""
    _, anchor, _ = second_name()
    refused = weightlab("remove", anchor, "--all")
    assert refused.code == 4 and "--links copy" in refused.err
    assert weightlab("remove", anchor, "--all", "--links", "copy").code == 0
    assert Path(anchor).read_bytes() == Path("clean.safetensors").read_bytes()


def test_a_file_that_is_given_back_comes_off(weightlab: Weightlab, place: Path) -> None:
    other, anchor, file = renamed_shard()
    refused = weightlab("verify", other)
    assert "give s.safetensors back" in refused.err
    os.rename(file, "m/s.safetensors")
    assert weightlab("remove", anchor, "--all").code == 0
    assert Path("m/s.safetensors").read_bytes() == Path("clean.safetensors").read_bytes()


@pytest.mark.parametrize("make", [without_index, renamed, renamed_shard])
def test_a_record_without_its_file_is_dropped(weightlab: Weightlab, place: Path, make: Makes) -> None:
    other, anchor, file = make()
    before = Path(file).read_bytes()
    assert weightlab("remove", anchor, "--forget").code == 0
    assert Path(file).read_bytes() == before
    assert weightlab("status", other).code == 0


def test_two_records_of_the_same_bytes_come_off_in_turn(weightlab: Weightlab, place: Path) -> None:
    """As version 0.1 made them: the second took the patched bytes for clean."""
    with zipfile.ZipFile(Path(__file__).parent / "golden" / "twice-0.1.zip") as archive:
        archive.extractall("twice")
    assert load_file("twice/m/model.safetensors")["w"].tolist() == [[3.0] * 4] * 4
    assert weightlab("verify", "twice/m").code == 5
    assert weightlab("apply", "twice/m", "q.safetensors", "--in-place").code == 5
    assert weightlab("remove", "twice/m/model.safetensors", "--all").code == 5  # not the one that went on last
    assert weightlab("remove", "twice/m", "--all").code == 0
    assert weightlab("remove", "twice/m/model.safetensors", "--all").code == 0
    assert Path("twice/m/model.safetensors").read_bytes() == Path("clean.safetensors").read_bytes()
    assert sorted(os.listdir("twice/m")) == ["model.safetensors", INDEX]


def test_files_of_their_own_beside_it_are_free(weightlab: Weightlab, place: Path) -> None:
    """A copy of the clean file in the same folder is another model."""
    shutil.copy("clean.safetensors", "m/model.safetensors")
    shutil.copy("clean.safetensors", "m/backup.safetensors")
    assert weightlab("apply", "m/model.safetensors", "p.safetensors", "--in-place").code == 0
    assert weightlab("apply", "m/backup.safetensors", "q.safetensors", "--in-place").code == 0
    assert load_file("m/model.safetensors")["w"].tolist() == [[2.0] * 4] * 4
    assert load_file("m/backup.safetensors")["w"].tolist() == [[3.0] * 4] * 4
    for name in ("model", "backup"):
        assert weightlab("remove", f"m/{name}.safetensors", "--all").code == 0
        assert Path(f"m/{name}.safetensors").read_bytes() == Path("clean.safetensors").read_bytes()


def test_one_shard_of_a_larger_model_is_not_changed_by_itself(weightlab: Weightlab, place: Path) -> None:
    shutil.copy("clean.safetensors", "m/s.safetensors")
    index(f"m/{INDEX}", "s.safetensors")
    before = content(place)
    for more in ((), ("--dry-run",)):
        ended = weightlab("apply", "m/s.safetensors", "p.safetensors", "--in-place", *more)
        assert ended.code == 4 and "one shard of a larger checkpoint" in ended.err and INDEX in ended.err
    assert content(place) == before
    shutil.copy("clean.safetensors", "m/free.safetensors")  # which the index does not have
    assert weightlab("apply", "m/free.safetensors", "p.safetensors", "--in-place").code == 0
    assert load_file("m/free.safetensors")["w"].tolist() == [[2.0] * 4] * 4
    assert load_file("m/s.safetensors")["w"].tolist() == [[1.0] * 4] * 4
