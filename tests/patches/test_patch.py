"""Patches as objects: opening, scales, saving, verifying, temporary storage."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import weightlab as wl
from tests.patches.tools import changed, make, overwrite, place_of, state
from weightlab.errors import IntegrityError, MalformedFileError, MissingInputError, NotPatchableError, UsageError
from weightlab.files import foreign
from weightlab.patches import layout
from weightlab.patches.patch import is_patch, open_patch
from weightlab.stream.executor import Resources
from weightlab.tensors.workspace import Workspace


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(layout, "SHARD_BYTES", 1700)
        make(tmp_path / "shards", "dense")
    return tmp_path / "shards"


def test_scales() -> None:
    patch = wl.diff(state(), state(1, 0.01), encode="dense")
    assert patch.scale == 1.0
    assert (0.5 * patch).scale == (patch * 0.5).scale == 0.5
    assert (-patch).scale == -1.0 and (-1 * -patch).scale == 1.0 and (-0.5 * patch * 4).scale == -2.0
    assert (patch * np.float32(0.25)).scale == 0.25
    assert patch.at(3).scale == 3.0 and (0.5 * patch).at(3).scale == 3.0
    assert patch.at(0.1).exact_scale == float(np.float32(0.1)) != 0.1
    assert (0.5 * patch).id == patch.id


def test_scaled_patches_do_what_they_say() -> None:
    base = state()
    patch = wl.diff(base, state(1, 0.01), encode="dense")
    delta = {n: wl.apply({n: torch.zeros_like(t) for n, t in base.items()}, patch)[n] for n, t in base.items()}
    for name, tensor in wl.apply(base, 0.5 * patch).items():
        assert torch.equal(tensor, base[name] + 0.5 * delta[name] if name != "steps" else base[name])
    for name, tensor in wl.apply(base, -patch).items():
        assert torch.equal(tensor, base[name] - delta[name] if name != "steps" else base[name])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, -1e300])
def test_scales_that_are_no_numbers_of_fp32(scale: float) -> None:
    patch = wl.diff(state(), state(1, 0.01))
    for use in (patch.at, patch.__mul__, patch.__rmul__):
        with pytest.raises(UsageError, match="finite number"):
            use(scale)


def test_other_things_cannot_be_multiplied() -> None:
    patch = wl.diff(state(), state(1, 0.01))
    for other in (None, [2], patch):
        with pytest.raises(TypeError):
            patch * other  # type: ignore[operator]


def test_equality_is_of_id_and_scale(tmp_path: Path) -> None:
    patch = make(tmp_path / "a.safetensors")
    again = make(tmp_path / "b.safetensors")
    other = make(tmp_path / "c.safetensors", "dense")
    assert patch == again and hash(patch) == hash(again) and len({patch, again, other}) == 2
    assert patch != 0.5 * patch and patch != other and 0.5 * patch == again * 0.5


def test_saving(tmp_path: Path, sharded: Path) -> None:
    patch = wl.diff(state(), state(1, 0.01))
    assert patch.path is None and "patch " in patch.label
    file = patch.save(tmp_path / "p.safetensors")
    folder = patch.save(tmp_path / "folder")
    assert file == folder == patch and file.path == tmp_path / "p.safetensors"
    assert (tmp_path / "folder" / "patch.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    copied = open_patch(sharded).save(tmp_path / "more")
    copied.verify()
    assert {p.name: p.read_bytes() for p in sharded.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "more").iterdir()
    }
    with pytest.raises(UsageError, match="is sharded"):
        copied.save(tmp_path / "one.safetensors")
    with pytest.raises(NotPatchableError, match="exists already"):
        patch.save(tmp_path / "p.safetensors")
    other = wl.diff(state(), state(2, 0.01)).save(tmp_path / "p.safetensors", overwrite=True)
    assert open_patch(tmp_path / "p.safetensors") == other != patch
    file.verify()  # still open: the file that it was opened from lives on


@pytest.mark.parametrize("scale", [0.5, -1.0, 1e-7])
def test_a_scale_is_saved(tmp_path: Path, sharded: Path, scale: float) -> None:
    patch = open_patch(sharded)
    for scaled in (
        patch.at(scale).save(tmp_path / "folder"),
        wl.diff(state(), state(1, 0.01), encode="dense").at(scale).save(tmp_path / "p.safetensors"),
    ):
        scaled.verify()
        assert scaled.scale == scaled.header.scale == scale and scaled.id != patch.id
        assert scaled.records == patch.records
        direct, saved = wl.apply(state(), patch.at(scale)), wl.apply(state(), scaled)
        assert all(torch.equal(direct[name], saved[name]) for name in direct)
    assert open_patch(tmp_path / "folder") == open_patch(tmp_path / "p.safetensors")
    back = open_patch(tmp_path / "folder").at(1.0).save(tmp_path / "back")
    assert back == patch


@pytest.mark.parametrize("encode", ["exact", "dense", "quantized:4", "sparse:0.5", "low_rank:2", "sign"])
def test_every_part_is_verified(tmp_path: Path, encode: str) -> None:
    path = tmp_path / "p.safetensors"
    patch = make(path, encode)
    parts = [(name, part) for name, r in patch.records.items() for part in r.parts if place_of(path, name, part)[1]]
    content = path.read_bytes()
    for name, part in parts:
        offset, length = place_of(path, name, part)
        overwrite(path, offset + length // 2, bytes([content[offset + length // 2] ^ 4]))
        with pytest.raises(IntegrityError) as caught:
            open_patch(path).verify()
        assert caught.value.offenders == (f"{name}, part {part!r}",) and caught.value.exit_code == 5
        path.write_bytes(content)
    for name, part in parts:
        offset, length = place_of(path, name, part)
        path.write_bytes(path.read_bytes()[:offset] + bytes(length) + path.read_bytes()[offset + length :])
    with pytest.raises(IntegrityError) as caught:
        open_patch(path).verify(Resources(threads=3))
    assert len(caught.value.offenders) >= len(parts) - 2  # a part may be zeros as it is
    assert list(caught.value.offenders) == sorted(caught.value.offenders)


def test_summary_and_bytes(tmp_path: Path) -> None:
    patch = make(tmp_path / "p.safetensors", {"*bias": "exact", "embed*": "sign", "*": "dense:bf16"})
    rows = {str(row["name"]): row for row in patch.summary()}
    assert rows.keys() == patch.records.keys()
    assert rows["layers.0.bias"]["relative_error"] == 0.0 and rows["layers.0.bias"]["encoding"] == "exact"
    assert rows["embed.weight"]["bytes"] == 24 * 16 // 8 + 4 * 24 == patch.nbytes("embed.weight")
    assert patch.nbytes() == sum(patch.nbytes(name) for name in patch.records)
    error = patch.records["embed.weight"].error
    assert error is not None and rows["embed.weight"]["relative_error"] == error.relative_l2 > 0.3
    assert "5 tensors, scale 1" in repr(patch)


def test_temporary_storage_lasts_as_long_as_the_patch() -> None:
    patch = wl.diff(state(), state(1, 0.01))
    half = 0.5 * patch
    place = next(iter(patch.files.values())).parent
    del patch
    gc.collect()
    half.verify()
    assert place.is_dir()
    del half
    gc.collect()
    assert not place.exists()


def test_files_are_closed_with_the_last_patch(tmp_path: Path, sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    patch = open_patch(sharded)
    scaled = -patch
    assert len(os.listdir("/proc/self/fd")) > before
    del patch, scaled
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_parts_keep_the_files_open() -> None:
    parts = wl.diff({"w": torch.zeros(3)}, {"w": torch.ones(3)}, encode="dense").parts("w")
    gc.collect()
    assert parts.read("delta", 0, 3, Workspace()).tolist() == [1.0, 1.0, 1.0]


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(MissingInputError) as caught:
            open_patch(path)
        assert caught.value.exit_code == 3 and not is_patch(path)


def test_is_patch(tmp_path: Path, sharded: Path, chgnet_safetensors: dict[str, Path]) -> None:
    make(tmp_path / "p.safetensors")
    make(tmp_path / "folder")
    assert is_patch(tmp_path / "p.safetensors") and is_patch(tmp_path / "folder") and is_patch(sharded)
    (tmp_path / "text").write_text("hello")
    assert not is_patch(tmp_path / "text") and not is_patch(chgnet_safetensors["0.3.0"])


def index_with(folder: Path, **changes: object) -> Path:
    path = folder / "patch.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"].update(changes.pop("weight_map", {}))
    path.write_text(json.dumps({**tree, **changes}))
    return folder


@pytest.mark.parametrize("file", ["../patch-00001-of-00005.safetensors", "/etc/passwd", "..", "", "a\0b"])
def test_an_index_that_points_outside(sharded: Path, file: str) -> None:
    with pytest.raises(MalformedFileError, match="not plain names"):
        open_patch(index_with(sharded, weight_map={"steps::delta": file}))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "patch.safetensors.index.json").write_text(text)
    with pytest.raises(MalformedFileError) as caught:
        open_patch(sharded)
    assert caught.value.exit_code == 3 and not is_patch(sharded)


def test_an_index_that_disagrees_with_the_shards(sharded: Path) -> None:
    patch = open_patch(sharded)
    entry = "temperature::delta"
    where = next(p.name for p in sharded.glob("*.safetensors") if entry.encode() in p.read_bytes()[:4000])
    other = next(n for n in sorted(patch.files) if n not in (where, "patch.safetensors.index.json"))
    with pytest.raises(MalformedFileError) as caught:
        open_patch(index_with(sharded, weight_map={entry: other, "ghost": other}))
    assert set(caught.value.offenders) == {
        f"{entry}: the index has it in {other}, it is in {where}",
        "ghost: in the index and not there",
    }


def test_a_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(MissingInputError) as caught:
        open_patch(sharded)
    assert caught.value.offenders == (gone.name,)


def test_a_shard_alone(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    with pytest.raises(IntegrityError, match="is one of"):
        open_patch(shard)


def test_a_shard_of_another_patch(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 1700)
    wl.diff(state(), state(2, 0.01), tmp_path / "other", encode="dense")
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(IntegrityError, match="not the shards of one patch") as caught:
        open_patch(sharded)
    assert caught.value.exit_code == 5


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    taken: dict[str, object] = {}
    changed(first, lambda container, header: taken.update(header["tensors"]))
    changed(second, lambda container, header: header["tensors"].update(taken))
    with pytest.raises(IntegrityError) as caught:
        open_patch(sharded)
    assert set(caught.value.offenders) >= {f"{name}: in two shards" for name in taken}


def test_a_shard_counted_wrong(sharded: Path) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0]
    changed(first, lambda container, header: header["shard"].update(count=9))
    with pytest.raises(IntegrityError) as caught:
        open_patch(sharded)
    assert f"{first.name}: is not one of {len(list(sharded.glob('*.safetensors')))} shards" in caught.value.offenders


def test_the_same_shard_twice(sharded: Path) -> None:
    changed(sorted(sharded.glob("*.safetensors"))[1], lambda container, header: header["shard"].update(index=0))
    with pytest.raises(IntegrityError, match="not the shards of one patch"):
        open_patch(sharded)


def test_an_index_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a patch of 400,000 tensors has 70 MB: more than any other JSON file that is read."""
    monkeypatch.setattr(layout, "SHARD_BYTES", 200)
    base = {f"{i}.weight": torch.zeros(8, 8) for i in range(4)}
    patch = wl.diff(base, {n: t + 1 for n, t in base.items()}, tmp_path / "p", encode="dense")
    index = tmp_path / "p" / "patch.safetensors.index.json"
    index.write_bytes(index.read_bytes() + b" " * (foreign.MAX_BYTES + 1))
    assert open_patch(tmp_path / "p").id == patch.id
    assert open_patch(tmp_path / "p").at(0.5).save(tmp_path / "q").scale == 0.5
