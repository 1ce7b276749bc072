"""What checkpoints and patches hold, and what differs: against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.ops.test_apply_out import sharded, state
from weightlab.errors import InputError, IntegrityError, NotPatchableError, UsageError, WrongBaseError
from weightlab.ops.compare import difference
from weightlab.ops.plot import plot


def norm(*tensors: torch.Tensor) -> float:
    return float(np.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors)))


def test_a_checkpoint(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    found = wl.inspect(base)
    assert (found.kind, found.parameters) == ("checkpoint", sum(t.numel() for t in state().values()))
    assert found.bytes == found.full_bytes == sum(t.nbytes for t in state().values())
    rows = {r.name: r for r in found.tensors}
    assert rows["embed"].norm == pytest.approx(norm(state()["embed"]))
    assert rows["embed"].largest == pytest.approx(float(state()["embed"].abs().max()))
    assert rows["steps"].norm is None and rows["steps"].dtype == "I64"
    layers = {r.layer: r for r in found.layers}
    assert layers["layers.0"].norm == pytest.approx(norm(state()["layers.0.w"], state()["layers.0.b"]))
    assert layers["layers.0"].tensors == 2
    assert wl.inspect(base, norms=False).tensors[0].norm is None


def test_nan_and_infinity_are_counted(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, float("nan"), float("-inf"), 2.0])}, tmp_path / "m.safetensors")
    (row,) = wl.inspect(tmp_path / "m.safetensors").tensors
    assert row.nonfinite == 2 and row.norm == pytest.approx(np.sqrt(5))


@pytest.mark.parametrize("encode", ["exact", "dense:fp32"])
def test_a_patch(tmp_path: Path, encode: str) -> None:
    patch = wl.diff(state(), state(1, 0.1), tmp_path / "p.safetensors", encode=encode)
    found = wl.inspect(tmp_path / "p.safetensors", base=state())
    rows = {r.name: r for r in found.tensors}
    change = state(1, 0.1)["embed"] - state()["embed"]
    assert found.kind == "patch" and rows["embed"].encoding == encode.split(":")[0]
    assert rows["embed"].norm == pytest.approx(norm(change), rel=1e-5)
    assert rows["embed"].relative == pytest.approx(norm(change) / norm(state()["embed"]), rel=1e-5)
    assert found.facts["id"] == patch.id
    alone = wl.inspect(tmp_path / "p.safetensors")
    assert (alone.tensors[0].norm is None) == (encode == "exact") == bool(alone.notes)
    if encode == "exact":
        with pytest.raises(WrongBaseError):
            wl.inspect(patch, base=state(3, 1.0))
    save_file(state(), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="is a checkpoint"):
        wl.inspect(tmp_path / "m.safetensors", base=state())


def test_pictures_are_whole_or_absent(tmp_path: Path) -> None:
    found = wl.inspect(wl.diff(state(), state(1, 0.1)), base=state())
    plot(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(NotPatchableError):
        plot(found, tmp_path / "p.png")
    with pytest.raises(UsageError, match=r"\.png"):
        plot(found, tmp_path / "p.jpg")
    with pytest.raises(InputError, match="no norms"):
        plot(wl.inspect(wl.diff(state(), state(1, 0.1))), tmp_path / "q.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_difference_without_a_patch() -> None:
    tuned = state(1, 0.1) | {"embed": state()["embed"], "steps": torch.tensor([8])}
    found = difference(state(), tuned)
    assert [r.name for r in found.tensors] == ["layers.0.b", "layers.0.w", "layers.1.w", "steps"]
    rows = {r.name: r for r in found.tensors}
    change = tuned["layers.1.w"] - state()["layers.1.w"]
    assert rows["layers.1.w"].norm == pytest.approx(norm(change), rel=1e-5) and rows["steps"].norm is None
    assert found.facts == {"compared": 5, "changed": 4, "added": [], "removed": []}


def test_a_tied_tensor_under_different_names_is_no_difference() -> None:
    shared = torch.randn(4, 4)
    first = {"embed": shared, "head": shared, "w": torch.ones(2)}
    second = {"head": shared.clone(), "w": torch.ones(2)}  # one name only, as a file of tied weights has
    assert difference(first, second).facts["changed"] == 0
    assert difference(second, first).facts["changed"] == 0


def test_verify(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    patch = wl.diff(base, state(1, 0.1), tmp_path / "p.safetensors")
    checked = wl.verify(base)
    assert (checked.kind, checked.tensors, checked.clean) == ("checkpoint", 5, None)
    assert checked.identity == patch.header.base.fingerprint
    assert wl.verify(tmp_path / "p.safetensors", base=base).identity == patch.id
    wl.apply(base, patch, in_place=True)
    on = wl.verify(base)
    assert patch.header.result is not None
    assert (on.identity, on.clean) == (patch.header.result.fingerprint, checked.identity)
    wl.apply(base, wl.diff(state(), state(2, 0.1), encode="dense"), out=tmp_path / "other")
    with pytest.raises(WrongBaseError):
        wl.verify(tmp_path / "p.safetensors", base=tmp_path / "other")
    shard = base / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(IntegrityError):
        wl.verify(base)
    content = bytearray((tmp_path / "p.safetensors").read_bytes())
    content[-3] ^= 4
    (tmp_path / "p.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError):
        wl.verify(tmp_path / "p.safetensors")
