"""`weightlab diff`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content, same, weights
from tests.patches.tools import state


def test_a_patch_takes_the_base_to_the_tuned_model(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("diff", "base", "tuned", "-o", "p.safetensors")
    assert ended.code == 0 and ended.err == ""
    patch = wl.open_patch("p.safetensors")
    assert ended.out.splitlines()[-1].startswith("p.safetensors: 5 tensors, ")
    assert ended.out.endswith(f"id {patch.id[:12]}\n")
    assert weightlab("apply", "base", "p.safetensors", "-o", "new").code == 0
    assert same(weights("new"), weights("tuned"))


def test_what_is_said_as_json(weightlab: Weightlab, place: Path) -> None:
    words = ("--encode", "dense", "--encode", "layers.*=low_rank:2", "--base-name", "org/base", "--revision", "abc")
    told = weightlab(
        *("diff", "base", "tuned", "-o", "p.safetensors", "--json", "--license", "mit", "--notes", "a note"), *words
    ).json
    patch = wl.open_patch("p.safetensors")
    assert (told["path"], told["id"], told["kind"]) == ("p.safetensors", patch.id, "diff")
    assert (told["license"], told["notes"], told["dry_run"]) == ("mit", "a note", False)
    assert (told["base"]["name"], told["base"]["revision"]) == ("org/base", "abc")
    assert {name: held["tensors"] for name, held in told["encodings"].items()} == {"dense": 3, "low_rank": 2}
    assert told["tensors"] == 5 and told["bytes"] == patch.nbytes()
    assert 0 < told["largest_relative_error"] < 1
    assert patch.header.license == "mit" and patch.header.base.name == "org/base"


def test_a_folder_as_output(weightlab: Weightlab, place: Path) -> None:
    assert weightlab("diff", "base", "tuned", "-o", "patch").code == 0
    assert [f.name for f in (place / "patch").iterdir()] == ["patch.safetensors"]
    assert weightlab("verify", "patch", "--base", "base").code == 0


def test_without_o_a_table_says_where_they_differ(weightlab: Weightlab, place: Path) -> None:
    before = content(place)
    ended = weightlab("diff", "base", "tuned")
    lines = ended.out.splitlines()
    assert ended.code == 0 and " ".join(lines[0].split()) == "layer tensors parameters bytes norm rms largest relative"
    assert [line.split()[0] for line in lines[1:-1]] == ["embed", "layers.0", "layers.1", "temperature"]
    assert lines[-1] == "5 of 6 tensors differ, 5.32 kB"
    assert content(place) == before


def test_the_norms_in_that_table(weightlab: Weightlab, place: Path) -> None:
    told = weightlab("diff", "base", "tuned", "--json").json
    base, tuned = state(), state(1, 0.01)
    for row in told["tensors"]:
        delta = (tuned[row["name"]] - base[row["name"]]).double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
        assert row["largest"] == pytest.approx(float(delta.abs().max()), rel=1e-9)
        assert row["relative"] == pytest.approx(float(delta.norm() / base[row["name"]].double().norm()), rel=1e-9)
    assert told["facts"] == {"compared": 6, "changed": 5, "added": [], "removed": []}


@pytest.mark.parametrize("quiet", [(), ("--quiet",), ("--json",)])
def test_the_exit_code_says_whether_they_differ(weightlab: Weightlab, place: Path, quiet: tuple[str, ...]) -> None:
    assert weightlab("diff", "base", "tuned", "--exit-code", *quiet).code == 1
    assert weightlab("diff", "base", "base", "--exit-code", *quiet).code == 0
    assert weightlab("diff", "base", "tuned", *quiet).code == 0
    assert weightlab("diff", "base", "tuned", "--exit-code", "--include", "steps", *quiet).code == 0
    assert weightlab("diff", "base", "nothing", "--exit-code", *quiet).code == 3


def test_added_and_removed_tensors_are_a_difference(weightlab: Weightlab, place: Path) -> None:
    less = {n: t for n, t in state().items() if n != "temperature"}
    save_file(less, place / "less.safetensors")
    ended = weightlab("diff", "base", "less.safetensors", "--allow", "removed", "--exit-code")
    assert ended.code == 1 and ended.out.splitlines() == ["removed: temperature", "0 of 5 tensors differ, 0 B"]
    ended = weightlab("diff", "less.safetensors", "base", "--allow", "added", "--exit-code")
    assert ended.code == 1 and ended.out.splitlines() == ["added: temperature", "0 of 5 tensors differ, 0 B"]
    assert weightlab("diff", "base", "less.safetensors", "--exit-code").code == 4


def test_options_that_do_not_apply_are_refused(weightlab: Weightlab, place: Path) -> None:
    ended = weightlab("diff", "base", "tuned", "--notes", "n", "--encode", "sign", "--dry-run")
    assert ended.code == 2
    assert ended.err.splitlines()[1:] == ["  --encode", "  --notes", "  --dry-run", "  → say where it goes with -o"]
    ended = weightlab("diff", "base", "tuned", "-o", "p.safetensors", "--exit-code")
    assert ended.code == 2 and "leave out -o" in ended.err
    assert not (place / "p.safetensors").exists()


def test_a_dry_run_says_what_it_would_be_and_leaves_nothing(
    weightlab: Weightlab, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))
    before = content(place)
    told = weightlab("diff", "base", "tuned", "-o", "p.safetensors", "--dry-run", "--json").json
    assert "would be 5 tensors" in weightlab("diff", "base", "tuned", "-o", "p.safetensors", "--dry-run").out
    assert content(place) == before
    made = weightlab("diff", "base", "tuned", "-o", "p.safetensors", "--json").json
    assert told.pop("memory") > 2**28 and told.pop("dry_run") and not made.pop("dry_run")
    assert told == made


def test_what_is_there_already_stays(weightlab: Weightlab, place: Path) -> None:
    (place / "p.safetensors").write_text("mine")
    for dry in ((), ("--dry-run",)):
        ended = weightlab("diff", "base", "tuned", "-o", "p.safetensors", *dry)
        assert ended.code == 4 and "exists already" in ended.err
    assert (place / "p.safetensors").read_text() == "mine"


def test_include_and_exclude(weightlab: Weightlab, place: Path) -> None:
    words = ("--include", "layers.*", "--include", "embed*", "--exclude", "*.bias")
    assert weightlab("diff", "base", "tuned", "-o", "p.safetensors", *words).code == 0
    assert set(wl.open_patch("p.safetensors").records) == {"embed.weight", "layers.0.weight", "layers.1.conv"}
    ended = weightlab("diff", "base", "tuned", "-o", "q.safetensors", "--include", "layer.*", "--exclude", "nope")
    assert ended.code == 2 and ended.err.splitlines()[1:3] == ["  'layer.*'", "  'nope'"]


def test_map_renames_prefixes(weightlab: Weightlab, place: Path) -> None:
    save_file({f"model.{n}": t for n, t in weights("tuned").items()}, place / "wrapped.safetensors")
    ended = weightlab("diff", "base", "wrapped.safetensors", "-o", "p.safetensors")
    assert ended.code == 4 and "--map model.=" in ended.err and len(ended.err.splitlines()) == 2
    assert weightlab("diff", "base", "wrapped.safetensors", "-o", "p.safetensors", "--map", "model.=").code == 0
    assert weightlab("diff", "base", "tuned", "-o", "q.safetensors").code == 0
    assert wl.open_patch("p.safetensors").id == wl.open_patch("q.safetensors").id
    for wrong in (("--map", "model."), ("--map", "a=b", "--map", "a=c"), ("--map", "nothing.=")):
        assert weightlab("diff", "base", "wrapped.safetensors", "-o", "r.safetensors", *wrong).code == 2


def test_misfits_are_listed_and_nothing_is_written(weightlab: Weightlab, place: Path) -> None:
    other = {**state(), "embed.weight": torch.zeros(24, 17), "layers.0.bias": torch.zeros(3), "more": torch.zeros(1)}
    save_file({n: t for n, t in other.items() if n != "steps"}, place / "misfit.safetensors")
    before = content(place)
    error = weightlab("diff", "base", "misfit.safetensors", "-o", "p.safetensors", "--json").error
    assert error["exit_code"] == 4
    for name in ("embed.weight", "layers.0.bias", "more", "steps"):
        assert sum(line.startswith(name) for line in error["offenders"]) == 1
    assert content(place) == before


def test_nan_is_refused_unless_it_is_allowed(weightlab: Weightlab, place: Path) -> None:
    bad = state(1, 0.01)
    bad["embed.weight"][0, 0], bad["layers.1.conv"][0] = torch.nan, torch.inf
    save_file(bad, place / "bad.safetensors")
    ended = weightlab("diff", "base", "bad.safetensors", "-o", "p.safetensors")
    assert ended.code == 3 and "embed.weight" in ended.err and "layers.1.conv" in ended.err
    assert not (place / "p.safetensors").exists()
    assert weightlab("diff", "base", "bad.safetensors", "-o", "p.safetensors", "--allow-nonfinite").code == 0


@pytest.mark.parametrize("encode", ["sing", "dense:int8", "low_rank", "quantized:9", "*norm*=dense", "a=b=c"])
def test_encodings_that_make_no_sense(weightlab: Weightlab, place: Path, encode: str) -> None:
    ended = weightlab("diff", "base", "tuned", "-o", "p.safetensors", "--encode", encode)
    assert ended.code == 2 and len(ended.err.splitlines()) >= 2
    assert not (place / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hf://org/model", "hf download org/model --local-dir model"),
        ("org/model", "hf download org/model --local-dir model"),
        ("hf://org/model@v1", "hf download org/model --revision v1 --local-dir model"),
        (
            "hf://org/model@v1/sub/a.safetensors",
            "hf download org/model sub/a.safetensors --revision v1 --local-dir model",
        ),
        ("hf://org/model/a.safetensors", "hf download org/model a.safetensors --local-dir model"),
    ],
)
def test_names_on_the_hub_are_refused_with_what_to_do(
    weightlab: Weightlab, place: Path, name: str, command: str
) -> None:
    ended = weightlab("diff", name, "tuned", "-o", "p.safetensors")
    assert ended.code == 3 and ended.err.splitlines()[-1] == f"  → download it first, for example: {command}"


def test_key_finds_the_weights_in_pickles(weightlab: Weightlab, place: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        torch.save({"epoch": 1, "ema": {"weights": state(seed, 0.01 * seed)}}, f"{name}.pt")
    assert weightlab("diff", "a.pt", "b.pt", "-o", "p.safetensors", "--key", "ema.weights").code == 0
    assert weightlab("diff", "base", "tuned", "-o", "q.safetensors").code == 0
    assert wl.open_patch("p.safetensors").id == wl.open_patch("q.safetensors").id
    assert weightlab("diff", "a.pt", "b.pt", "--key", "ema.nothing").code == 3


def test_a_pickle_that_runs_code_is_not_run(weightlab: Weightlab, place: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(place / "was run"),)

    torch.save({"a": torch.zeros(2), "b": Evil()}, "evil.pt")
    ended = weightlab("diff", "evil.pt", "tuned")
    assert ended.code == 3 and not (place / "was run").exists()


def test_a_real_pair(weightlab: Weightlab, chgnet: Mapping[str, Path], place: Path) -> None:
    told = weightlab("diff", chgnet["0.3.0"], chgnet["r2scan"], "--json").json
    assert told["facts"] == {"compared": 136, "changed": 128, "added": [], "removed": []}
    ended = weightlab("diff", chgnet["0.2.0"], chgnet["0.3.0"], "-o", "p.safetensors", "--json")
    assert ended.error["exit_code"] == 4 and len(ended.error["offenders"]) > 5
    assert not (place / "p.safetensors").exists()
