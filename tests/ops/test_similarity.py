"""Comparing and identifying, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, NamesMismatchError, UsageError, WrongBaseError
from weightlab.ops.plot_comparison import plot_comparison

State = dict[str, Tensor]


def model(seed: int, size: float = 0.1, dtype: torch.dtype = torch.float32) -> State:
    """A base with noise of that size on it; seed 0 is the base itself."""
    fixed, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    shapes = {"layers.0.w": (9, 8), "layers.0.b": (9,), "layers.1.w": (5, 9), "head.w": (3, 5)}
    state = {n: torch.randn(s, generator=fixed) for n, s in shapes.items()}
    if seed:
        state = {n: t + size * torch.randn(t.shape, generator=own) for n, t in state.items()}
    return {n: t.to(dtype) for n, t in state.items()} | {"steps": torch.tensor(seed)}


def flat(state: State, *, less: State | None = None, only: str = "") -> np.ndarray:
    """Float tensors as one vector of fp64."""
    names = [n for n in sorted(state) if n != "steps" and n.startswith(only)]
    return np.concatenate([(state[n].double() - (less[n].double() if less else 0)).flatten().numpy() for n in names])


def saved(folder: Path, *seeds: int) -> list[Path]:
    for seed in seeds:
        save_file(model(seed), folder / f"{seed}.safetensors")
    return [folder / f"{seed}.safetensors" for seed in seeds]


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_checkpoints_as_changes_of_a_base_and_as_they_are(tmp_path: Path) -> None:
    base, *tuned = saved(tmp_path, 0, 1, 2)
    changes = [flat(model(s), less=model(0)) for s in (1, 2)]
    found = wl.compare(tuned, base=base)
    assert found.compared == "changes" and found.tensors == 4 and not found.notes
    assert found.norms == pytest.approx([np.linalg.norm(c) for c in changes], rel=1e-6)
    assert found.relative == pytest.approx([n / np.linalg.norm(flat(model(0))) for n in found.norms], rel=1e-6)
    assert found.cosines[0][1] == found.cosines[1][0] == pytest.approx(cos(*changes), abs=1e-6)
    assert found.cosines[0][0] == pytest.approx(1)
    assert [r.layer for r in found.layers] == ["head", "layers.0", "layers.1"]
    own = [flat(model(s), less=model(0), only="layers.0") for s in (1, 2)]
    assert found.layers[1].cosines[0][1] == pytest.approx(cos(*own), abs=1e-6)
    assert found.layers[1].norms == pytest.approx([np.linalg.norm(o) for o in own], rel=1e-6)
    assert np.sum([r.shares for r in found.layers], axis=0) == pytest.approx([1, 1])
    whole = wl.compare(tuned)
    assert whole.compared == "weights" and whole.relative is None
    assert whole.cosines[0][1] == pytest.approx(cos(flat(model(1)), flat(model(2))), abs=1e-6)


def test_patches_of_every_kind_and_their_scales(tmp_path: Path) -> None:
    base, one, two = saved(tmp_path, 0, 1, 2)
    exact = wl.diff(base, one, tmp_path / "exact.safetensors")
    dense = wl.diff(base, two, tmp_path / "dense.safetensors", encode="dense:fp32")
    changes = [flat(model(s), less=model(0)) for s in (1, 2)]
    found = wl.compare([exact, f"{tmp_path}/dense.safetensors@-2"], base=base)
    assert found.norms == pytest.approx([np.linalg.norm(changes[0]), 2 * np.linalg.norm(changes[1])], rel=1e-6)
    assert found.cosines[0][1] == pytest.approx(-cos(*changes), abs=1e-6)
    with pytest.raises(UsageError, match="exact"):
        wl.compare([exact, dense])
    with pytest.raises(UsageError, match="one base"):
        wl.compare([dense, one])
    with pytest.raises(WrongBaseError):
        wl.compare([exact, dense], base=two)
    assert wl.compare([dense, two], base=base).cosines[0][1] == pytest.approx(1)


def test_what_one_lacks_counts_as_zero_and_is_told(tmp_path: Path) -> None:
    base, one, two = saved(tmp_path, 0, 1, 2)
    whole = wl.diff(base, one, encode="dense:fp32")
    part = wl.diff(base, two, encode="dense:fp32", include=["layers.*"])
    found = wl.compare([whole, part])
    change = flat(model(2), less=model(0))
    change[:15] = 0  # head.w comes first
    assert found.cosines[0][1] == pytest.approx(cos(flat(model(1), less=model(0)), change), abs=1e-6)
    assert len(found.notes) == 1 and "lacks 1 of 4" in found.notes[0]
    assert wl.compare([whole, part], include=["layers.*"]).notes == []


def test_other_shapes_are_all_listed(tmp_path: Path) -> None:
    (one,) = saved(tmp_path, 1)
    other = model(2) | {"head.w": torch.zeros(4, 5), "layers.0.b": torch.zeros(10)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(NamesMismatchError) as failed:
        wl.compare([one, tmp_path / "other.safetensors"])
    assert [o.split(":")[0] for o in failed.value.offenders] == ["head.w", "layers.0.b"]
    with pytest.raises(NamesMismatchError):
        wl.compare([one, tmp_path / "other.safetensors"], base=one)
    with pytest.raises(UsageError):
        wl.compare([one])


def test_the_same_with_one_thread_and_four(tmp_path: Path) -> None:
    paths = saved(tmp_path, 1, 2, 3)
    found = [wl.compare(paths, resources=wl.Resources(threads=n)) for n in (1, 4)]
    assert found[0] == found[1]


def test_identify_ranks_a_library(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    base = model(0)
    for seed in (1, 2, 3):
        wl.diff(base, model(seed), library / f"{seed}.safetensors", encode="quantized:8")
    near = {n: t + 0.02 * torch.randn(t.shape) if t.is_floating_point() else t for n, t in model(2).items()}
    asked = wl.diff(base, near, encode="dense:fp32")
    found = wl.identify(asked, [library])
    assert Path(found[0].label).name == "2.safetensors" and len(found) == 3
    assert found[0].cosine > 0.9 > 0.5 > found[1].cosine >= found[2].cosine
    assert found[0].shared_tensors == 4
    with pytest.raises(UsageError, match="no patch"):
        wl.identify(asked, [tmp_path])
    save_file(model(1), tmp_path / "weights.safetensors")
    with pytest.raises(UsageError):
        wl.identify(asked, [tmp_path / "weights.safetensors"])


def test_nothing_to_compare(tmp_path: Path) -> None:
    base, same = model(0), tmp_path / "same.safetensors"
    wl.diff(base, model(0), same)
    with pytest.raises(MisfitError, match="no tensor to compare"):
        wl.compare([same, same])
    save_file({"steps": torch.tensor([1])}, tmp_path / "whole_numbers.safetensors")
    with pytest.raises(MisfitError, match="no tensor to compare"):
        wl.compare([tmp_path / "whole_numbers.safetensors"] * 2)
    assert [(m.cosine, m.shared_tensors) for m in wl.identify(same, [same])] == [(0.0, 0)]


def test_picture(tmp_path: Path) -> None:
    found = wl.compare(saved(tmp_path, 1, 2, 3))
    plot_comparison(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
