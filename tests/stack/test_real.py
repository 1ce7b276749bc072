"""Real fine-tunes on and off real checkpoints on disk: the tuned bits, then the first file again, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.conftest import tensors_of
from tests.encodings.memory import same
from weightlab.errors import NotPatchableError


def check_on_and_off(base: Path, tuned: Path, place: Path) -> wl.Patch:
    """diff exact, apply --out and in place, remove: every bit, and the file's first SHA-256."""
    place.mkdir()
    model = Path(shutil.copy(base, place / "model.safetensors"))
    first = content(place)
    patch = wl.diff(model, tuned, place / "p.safetensors")
    (place / "p.safetensors").rename(place.parent / f"{place.name}.safetensors")
    expected = tensors_of(tuned)

    def check(path: Path) -> None:
        found = tensors_of(path)
        assert found.keys() == expected.keys() and all(same(found[n], expected[n]) for n in expected)

    wl.apply(model, patch, out=place.parent / f"{place.name}-new.safetensors")
    check(place.parent / f"{place.name}-new.safetensors")
    assert content(place) == first
    outcome = wl.apply(model, f"{place}.safetensors", in_place=True)
    assert outcome.tensors == len(patch.records)
    check(model)
    assert model.read_bytes() == (place.parent / f"{place.name}-new.safetensors").read_bytes()
    assert wl.verify(model).clean == patch.header.base.fingerprint
    wl.scale(model, patch, 0.5)
    assert wl.status(model).intact and content(place) != first
    wl.scale(model, patch, 1.0)
    check(model)
    wl.remove(model, patch)
    assert content(place) == first
    return patch


def test_chgnet(chgnet_safetensors: Mapping[str, Path], tmp_path: Path) -> None:
    base, tuned = chgnet_safetensors["0.3.0"], chgnet_safetensors["r2scan"]
    patch = check_on_and_off(base, tuned, tmp_path / "chgnet")
    before, after = tensors_of(base), tensors_of(tuned)
    unchanged = {n for n in before if same(before[n], after[n])}
    assert len(unchanged) == 8 and unchanged.isdisjoint(patch.records)
    assert len(patch.records) + len(unchanged) == len(before) == 136


def test_chgnet_from_its_pickles(chgnet: Mapping[str, Path], weightlab: Weightlab, tmp_path: Path) -> None:
    """A pickle is never changed in place; what is written from it is."""
    patch = tmp_path / "p.safetensors"
    assert weightlab("diff", chgnet["0.3.0"], chgnet["r2scan"], "-o", patch).code == 0
    model = Path(shutil.copy(chgnet["0.3.0"], tmp_path))
    before = content(tmp_path)
    assert weightlab("apply", model, patch, "--in-place").code == 4
    assert content(tmp_path) == before
    out = tmp_path / "model.safetensors"
    assert weightlab("apply", model, "-o", out).code == 0
    first = out.read_bytes()
    assert weightlab("apply", out, patch, "--in-place").code == 0
    assert wl.verify(out).identity == wl.verify(chgnet["r2scan"]).identity
    assert weightlab("remove", out, patch).code == 0
    assert out.read_bytes() == first


def test_chgnet_of_another_version(
    chgnet_safetensors: Mapping[str, Path], weightlab: Weightlab, tmp_path: Path
) -> None:
    """0.2.0 and 0.3.0 differ in names and shapes: one error lists every one, for a diff and for an apply."""
    old, new = tensors_of(chgnet_safetensors["0.2.0"]), tensors_of(chgnet_safetensors["0.3.0"])
    names = set(old.keys() ^ new.keys()) | {n for n in old.keys() & new.keys() if old[n].shape != new[n].shape}
    error = weightlab("diff", chgnet_safetensors["0.2.0"], chgnet_safetensors["0.3.0"], "--json").error
    assert error["exit_code"] == 4
    assert {line.split()[0].rstrip(":") for line in error["offenders"]} == names and len(names) > 10

    patch = wl.diff(chgnet_safetensors["0.3.0"], chgnet_safetensors["r2scan"], tmp_path / "p.safetensors")
    model = Path(shutil.copy(chgnet_safetensors["0.2.0"], tmp_path / "model.safetensors"))
    before = content(tmp_path)
    misfits = {n for n in patch.records if n not in old or old[n].shape != new[n].shape}
    for where in (("--in-place",), ("-o", tmp_path / "new.safetensors")):
        error = weightlab("apply", model, patch.path, *where, "--json").error
        assert error["exit_code"] == 4
        assert {line.split()[0].rstrip(":") for line in error["offenders"]} == misfits and misfits
    assert content(tmp_path) == before


@pytest.mark.parametrize("index", range(8))
def test_torchani(torchani_pairs: list[tuple[Path, Path]], tmp_path: Path, index: int) -> None:
    check_on_and_off(*torchani_pairs[index], tmp_path / "ani")


def test_torchani_patches_on_one_another(torchani_pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    """Eight networks of one architecture: dense patches of all eight on one of them, off in another order."""
    model = Path(shutil.copy(torchani_pairs[0][0], tmp_path / "model.safetensors"))
    first = model.read_bytes()
    patches = [wl.diff(a, b, encode="dense:bf16").at(1 / 8) for a, b in torchani_pairs]
    for patch in patches:
        wl.apply(model, patch, in_place=True)
    patched = model.read_bytes()
    wl.apply(torchani_pairs[0][0], patches[::-1], out=tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == patched != first
    for patch in [*patches[::2], *patches[1::2]]:
        wl.remove(model, patch)
    assert model.read_bytes() == first and not (tmp_path / ".weightlab").exists()


def test_minilm(minilm: Path, minilm_tuned: Path, tmp_path: Path) -> None:
    """The fine-tune lacks a buffer that the base stores: that part is for a new checkpoint, the rest goes in place."""
    model = tmp_path / "model"
    shutil.copytree(minilm, model)
    first = content(model)
    patch = wl.diff(model, minilm_tuned, tmp_path / "p.safetensors", allow=["removed"])
    with pytest.raises(NotPatchableError) as caught:
        wl.apply(model, patch, in_place=True)
    assert [line.split()[0] for line in caught.value.offenders] == ["embeddings.position_ids"]
    assert content(model) == first
    wl.apply(model, patch, out=tmp_path / "new")
    expected = tensors_of(minilm_tuned / "model.safetensors")
    found = tensors_of(tmp_path / "new" / "model.safetensors")
    assert found.keys() == expected.keys() and all(same(found[n], expected[n]) for n in expected)
    others = {n: d for n, d in first.items() if "model.safetensors" not in n}
    assert others.items() <= content(tmp_path / "new").items()

    wl.apply(model, patch, exclude=["embeddings.position_ids"], in_place=True)
    found = tensors_of(model / "model.safetensors")
    assert found.keys() - expected.keys() == {"embeddings.position_ids"}
    assert all(same(found[n], expected[n]) for n in expected)
    small = wl.diff(model, minilm, tmp_path / "back.safetensors", encode="low_rank:4", include=["encoder.layer.5.*"])
    wl.apply(model, small.at(-0.5), in_place=True)
    wl.remove(model, patch)
    wl.remove(model, small)
    assert content(model) == first
