"""`weightlab inspect`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from importlib import util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import state


def test_a_checkpoint(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("inspect", "base")
    lines = ended.out.splitlines()
    assert ended.code == 0 and lines[0].split() == ["layer", "tensors", "parameters", "bytes", "norm", "rms", "largest"]
    assert [line.split()[0] for line in lines[1:-1]] == ["embed", "layers.0", "layers.1", "steps", "temperature"]
    assert lines[-1] == "6 tensors (5 F32, 1 I64), 1,330 parameters, 5.32 kB"
    assert weightlab("inspect", "base", "--layers").out == ended.out


def test_a_row_a_tensor(weightlab: Weightlab, place: Path) -> None:
    lines = weightlab("inspect", "base", "--tensors").out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [
        ["embed.weight", "F32", "24×16"],
        ["layers.0.bias", "F32", "16"],
        ["layers.0.weight", "F32", "16×40"],
        ["layers.1.conv", "F32", "8×4×3×3"],
        ["steps", "I64", "scalar"],
        ["temperature", "F32", "scalar"],
    ]


def test_norms_are_right(weightlab: Weightlab, place: Path) -> None:
    told = weightlab("inspect", "base", "--json").json
    tensors = {n: t.double() for n, t in state().items()}
    for row in told["tensors"]:
        tensor = tensors[row["name"]]
        assert row["parameters"] == tensor.numel()
        if row["name"] == "steps":
            assert row["norm"] is None
            continue
        assert row["norm"] == pytest.approx(float(tensor.norm()), rel=1e-9)
        assert row["rms"] == pytest.approx(float(tensor.square().mean().sqrt()), rel=1e-9)
        assert row["largest"] == float(tensor.abs().max())
    (layer,) = (row for row in told["layers"] if row["layer"] == "layers.0")
    both = torch.cat([tensors["layers.0.weight"].flatten(), tensors["layers.0.bias"]])
    assert (layer["tensors"], layer["norm"]) == (2, pytest.approx(float(both.norm()), rel=1e-9))


def test_headers_only(weightlab: Weightlab, place: Path) -> None:
    told = weightlab("inspect", "base", "--no-norms", "--json").json
    assert {row["norm"] for row in told["tensors"]} == {None}
    lines = weightlab("inspect", "base", "--no-norms").out.splitlines()
    assert lines[0].split() == ["layer", "tensors", "parameters", "bytes"]


def test_a_patch_says_what_it_is(weightlab: Weightlab, place: Path) -> None:
    words = ("--base-name", "org/base", "--license", "mit", "--notes", "for\x1b[31m science", "--encode", "low_rank:2")
    assert weightlab("diff", "base", "tuned", "-o", "p.safetensors", *words).code == 0
    patch = wl.open_patch("p.safetensors")
    lines = weightlab("inspect", "p.safetensors", "--tensors").out.splitlines()
    facts = dict(line.split(None, 1) for line in lines[1:7])
    assert facts["id"] == patch.id and facts["licence"] == "mit" and facts["notes"] == "for\\x1b[31m science"
    assert facts["base"] == f"org/base {patch.header.base.fingerprint}"
    assert any(line.split()[:2] == ["low_rank", "3"] for line in lines)
    (row,) = (line.split() for line in lines if line.startswith("layers.0.weight"))
    assert row[1:3] == ["low_rank", "16×40"] and 0.5 < float(row[-1]) < 1
    told = weightlab("inspect", "p.safetensors", "--json").json
    assert told["facts"]["id"] == patch.id and told["kind"] == "patch"


def test_a_patch_and_its_base(weightlab: Weightlab, patches: Path) -> None:
    ended = weightlab("inspect", "exact.safetensors")
    assert ended.code == 0 and "give --base" in ended.out.splitlines()[-1]
    told = weightlab("inspect", "exact.safetensors", "--base", "base", "--json").json
    base, tuned = state(), state(1, 0.01)
    assert len(told["tensors"]) == 5
    for row in told["tensors"]:
        delta = (tuned[row["name"]] - base[row["name"]]).double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row["relative"] == pytest.approx(float(delta.norm() / base[row["name"]].double().norm()), rel=1e-6)
    assert weightlab("inspect", "exact.safetensors", "--base", "tuned").code == 4


def test_nan_and_infinity_are_counted_and_leave_json_valid(weightlab: Weightlab, place: Path) -> None:
    save_file(
        {
            "a": torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0]),
            "huge": torch.full((2,), 1e200, dtype=torch.float64),
        },
        place / "bad.safetensors",
    )
    rows = {row["name"]: row for row in weightlab("inspect", "bad.safetensors", "--json").json["tensors"]}
    assert (rows["a"]["nonfinite"], rows["a"]["norm"]) == (3, 3.0)
    assert rows["huge"]["largest"] == 1e200
    ended = weightlab("inspect", "bad.safetensors")
    assert ended.out.splitlines()[0].endswith("NaN, inf") and ended.out.splitlines()[1].endswith("  3")


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, from its first chunk."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_a_picture(weightlab: Weightlab, chgnet: Mapping[str, Path], place: Path) -> None:
    assert weightlab("diff", chgnet["0.3.0"], chgnet["r2scan"], "-o", "p.safetensors").code == 0
    ended = weightlab("inspect", "p.safetensors", "--base", chgnet["0.3.0"], "--plot", "p.png")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "picture: p.png"
    width, height = png_size(place / "p.png")
    assert width > 400 and height > 300


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_a_picture_that_cannot_be_is_said_first(weightlab: Weightlab, patches: Path) -> None:
    (patches / "mine.png").write_text("mine")
    before = content(patches)
    for name, code in (("p.jpg", 2), ("mine.png", 4), ("no/such/p.png", 7)):
        ended = weightlab("inspect", "dense.safetensors", "--plot", name)
        assert (ended.code, ended.out) == (code, "")
    ended = weightlab("inspect", "exact.safetensors", "--plot", "p.png")
    assert ended.code == 3 and "give --base" in ended.err
    assert content(patches) == before


def test_a_picture_without_matplotlib(weightlab: Weightlab, patches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = util.find_spec
    monkeypatch.setattr("weightlab.ops.plot.find_spec", lambda name: None if name == "matplotlib" else original(name))
    ended = weightlab("inspect", "dense.safetensors", "--plot", "p.png")
    assert ended.code == 2 and "pip install 'weightlab[plot]'" in ended.err
    assert not (patches / "p.png").exists()


def test_a_dry_run_says_how_much_it_would_read(weightlab: Weightlab, patches: Path) -> None:
    told = weightlab("inspect", "dense.safetensors", "--base", "base", "--plot", "p.png", "--dry-run", "--json").json
    assert [(r["path"], r["bytes"]) for r in told["read"]] == [("dense.safetensors", 5316), ("base", 5324)]
    assert told["dry_run"] and told["memory"] > 2**28 and not (patches / "p.png").exists()


@pytest.mark.parametrize(
    ("words", "code"), [(("nothing",), 3), (("base", "--base", "tuned"), 2), (("nothing", "--base", "base"), 3)]
)
def test_what_makes_no_sense(weightlab: Weightlab, place: Path, words: tuple[str, ...], code: int) -> None:
    assert weightlab("inspect", *words).code == code


def test_a_truncated_file(weightlab: Weightlab, patches: Path) -> None:
    for name in ("other.safetensors", "dense.safetensors"):
        whole = Path(name).read_bytes()
        Path("cut.safetensors").write_bytes(whole[:-7])
        for words in (("inspect",), ("verify",), ("diff", "base")):
            ended = weightlab(*words, "cut.safetensors")
            assert ended.code == 3 and "cut.safetensors" in ended.err.splitlines()[0]


def test_a_pickle(weightlab: Weightlab, place: Path) -> None:
    torch.save({"state_dict": state()}, "model.ckpt")
    assert weightlab("inspect", "model.ckpt", "--json").json["parameters"] == 1330
