"""Changes in place of a model whose weights lie in several folders, cut off after every operation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import weightlab as wl
from tests.stack.disk_model import DiskModel
from tests.stack.test_replay import _record
from weightlab.errors import NotPatchableError

FILES = {"root": "model.safetensors", "dense": "2_Dense/model.safetensors"}


def model(folder: Path, seed: int, *, root: bool = True, name: str = "model") -> Path:
    """Two parts with a tensor each; without a root it is a pipeline of which only a variant is there."""
    generator = torch.Generator().manual_seed(seed)
    (folder / "2_Dense").mkdir(parents=True)
    if root:
        modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        save_file({"w": torch.randn(4, 4, generator=generator)}, folder / FILES["root"])
    else:
        (folder / "model_index.json").write_text('{"2_Dense": ["library", "Network"]}')
    save_file({"linear.weight": torch.randn(3, 4, generator=generator)}, folder / f"2_Dense/{name}.safetensors")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weights(folder: Path) -> dict[str, bytes] | None:
    """What a loader would take; None where a file is not there or not whole."""
    try:
        for path in sorted(folder.rglob("*.safetensors")):
            load_file(path)
    except SafetensorError:
        return None
    return {n: b for n, b in files(folder).items() if n.endswith(".safetensors") and ".weightlab/" not in n}


@pytest.mark.parametrize("how", ["killed", "power", "mixed"])
@pytest.mark.parametrize("case", ["root and part", "variant"])
def test_crash_after_every_operation(tmp_path: Path, how: str, case: str) -> None:
    root, name = case == "root and part", "model" if case == "root and part" else "diffusion_pytorch_model.fp16"
    base = model(tmp_path / "base", 0, root=root, name=name)
    wl.diff(base, model(tmp_path / "tuned", 1, root=root, name=name), tmp_path / "p.safetensors")
    clean = files(base)
    start = DiskModel(base)
    events = _record(lambda: wl.apply(base, tmp_path / "p.safetensors", in_place=True))
    before, after = {n: b for n, b in clean.items() if n.endswith(".safetensors")}, weights(base)
    assert after is not None and all(before[n] != after[n] for n in before)
    outcomes = set()
    place = tmp_path / "crashed"
    for count in range(len(events) + 1):
        if count:
            start.replay(*events[count - 1])
        start.materialise(place, how, seed=count)
        found = weights(place)
        whole = found is None or found.keys() != before.keys()
        assert whole or found in (before, after), f"a mixture loads after {events[count - 1]}"
        status = wl.status(place)
        assert status.intact and weights(place) == (after if status.patches else before)
        outcomes.add(bool(status.patches))
        if status.patches:
            wl.remove(place, everything=True)
        assert {n: b for n, b in files(place).items() if not n.endswith(".partial")} == clean
        assert not list(place.rglob(".weightlab"))
        shutil.rmtree(place)
    assert outcomes == {False, True}


def test_a_part_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0)
    patch = wl.diff(base, model(tmp_path / "tuned", 1))
    (base / "2_Dense").rename(tmp_path / "outside")
    (base / "2_Dense").symlink_to(tmp_path / "outside")
    before = files(tmp_path / "outside")
    for where in ({"in_place": True}, {"out": tmp_path / "out"}):
        with pytest.raises(wl.WeightlabError, match="symbolic link"):
            wl.apply(base, patch, **where)  # type: ignore[call-overload]
    assert files(tmp_path / "outside") == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_linked_files_of_a_part(tmp_path: Path, kind: str) -> None:
    base = model(tmp_path / "base", 0)
    patch = wl.diff(base, model(tmp_path / "tuned", 1))
    file, blob = base / FILES["dense"], tmp_path / "blob"
    file.rename(blob)
    file.symlink_to(blob) if kind == "symbolic" else file.hardlink_to(blob)
    before = blob.read_bytes()
    with pytest.raises(NotPatchableError) as failed:
        wl.apply(base, patch, in_place=True)
    assert failed.value.offenders == (FILES["dense"],)
    wl.apply(base, patch, in_place=True, links="copy")
    assert blob.read_bytes() == before
    right = load_file(tmp_path / "tuned" / FILES["dense"])["linear.weight"]
    assert torch.equal(load_file(file)["linear.weight"], right) and not file.is_symlink()


def test_a_stack_from_before_parts_counted(tmp_path: Path) -> None:
    """The record of a patch on the root is found under the root's own name, whatever lists the parts."""
    base, tuned = model(tmp_path / "base", 0), model(tmp_path / "tuned", 1)
    clean = files(base)
    root = load_file(tuned / FILES["root"])
    wl.diff(base / FILES["root"], tuned / FILES["root"], tmp_path / "root.safetensors")
    listing = (base / "modules.json").read_bytes()
    (base / "modules.json").unlink()
    wl.apply(base, tmp_path / "root.safetensors", in_place=True)
    (base / "modules.json").write_bytes(listing)
    assert wl.status(base).intact and len(wl.status(base).patches) == 1
    wl.diff(base / "2_Dense", tuned / "2_Dense", tmp_path / "dense.safetensors")
    wl.apply(base, tmp_path / "dense.safetensors", in_place=True, renames={"linear": "2_Dense/linear"})
    assert torch.equal(load_file(base / FILES["root"])["w"], root["w"])
    got, right = (load_file(m / FILES["dense"])["linear.weight"] for m in (base, tuned))
    assert torch.equal(got, right)
    wl.remove(base, everything=True)
    assert files(base) == clean
