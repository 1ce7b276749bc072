"""A patch adds no tensors out of proportion to its bytes, unless the user says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightlab_cli.main import run

import weightlab as wl
from weightlab.errors import MisfitError
from weightlab.patches import growth

BASE = {"w": torch.ones(4, 4), "rows": torch.ones(2, 1024)}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "FREE", 2**20)


def patch_of(tuned: dict[str, torch.Tensor], path: Path) -> wl.Patch:
    return wl.diff(BASE, tuned, path, allow=["added", "rows"])


GROWN = {
    "added": BASE | {"zeros": torch.zeros(1024, 1024)},
    "more rows": BASE | {"rows": torch.cat([BASE["rows"], torch.zeros(1024, 1024)])},
}


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("kind", GROWN)
def test_a_small_patch_that_adds_much_is_refused_before_the_first_byte(tmp_path: Path, kind: str) -> None:
    patch = patch_of(GROWN[kind], tmp_path / "p.safetensors")
    size, more = patch.nbytes(), 4 * 2**20
    assert more > growth.RATIO * size
    save_file(BASE, tmp_path / "m.safetensors")
    for attempt in (
        lambda: wl.apply(tmp_path / "m.safetensors", patch, out=tmp_path / "out.safetensors"),
        lambda: wl.apply(tmp_path / "m.safetensors", patch, out=tmp_path / "out.safetensors", dry_run=True),
        lambda: wl.apply(BASE, patch),
        lambda: wl.compose([patch], tmp_path / "c.safetensors", base=BASE),
    ):
        with pytest.raises(MisfitError, match="adds far more than it holds") as caught:
            attempt()
        assert list(caught.value.offenders) == [f"{patch.label} has {size:,} bytes and adds {more:,}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "p.safetensors"]


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("kind", GROWN)
def test_it_is_done_where_it_is_meant(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    patch_of(GROWN[kind], tmp_path / "p.safetensors")
    save_file(BASE, tmp_path / "m.safetensors")
    words = ["apply", str(tmp_path / "m.safetensors"), str(tmp_path / "p.safetensors"), "-o"]
    words.append(str(tmp_path / "o.safetensors"))
    assert run(words) == 4 and "--allow-growth" in capsys.readouterr().err
    assert run([*words, "--allow-growth"]) == 0
    written = load_file(tmp_path / "o.safetensors")
    assert written.keys() == GROWN[kind].keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in GROWN[kind].items())
    in_memory = wl.apply(BASE, tmp_path / "p.safetensors", allow_growth=True)
    assert all(torch.equal(in_memory[name], tensor) for name, tensor in GROWN[kind].items())


@pytest.mark.usefixtures("little")
def test_what_a_patch_holds_it_may_add(tmp_path: Path) -> None:
    tuned = BASE | {"new": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))}
    found = wl.apply(BASE, patch_of(tuned, tmp_path / "p.safetensors"))
    assert torch.equal(found["new"], tuned["new"])


def test_a_few_rows_of_zeros_are_nothing_to_ask_about(tmp_path: Path) -> None:
    found = wl.apply(BASE, patch_of(GROWN["added"], tmp_path / "p.safetensors"))
    assert torch.equal(found["zeros"], torch.zeros(1024, 1024))
