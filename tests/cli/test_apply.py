"""`weightlab apply`, and how patches are named."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content, same, weights
from tests.conftest import tensors_of
from tests.patches.tools import state


def on(weightlab: Weightlab, model: str = "base") -> dict[str, float]:
    """{patch: scale} of what is on a model."""
    return {p["name"]: p["scale"] for p in weightlab("status", model, "--json").json["patches"]}


def test_in_place(weightlab: Weightlab, patches: Path) -> None:
    ended = weightlab("apply", "base", "exact.safetensors", "--in-place")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.splitlines()[:2] == ["5 tensors computed, 10.63 kB written", "on base"]
    assert ended.out.splitlines()[3].split()[:2] == ["exact.safetensors", "1"]
    assert same(weights("base"), weights("tuned"))


def test_out(weightlab: Weightlab, patches: Path) -> None:
    before = content(patches / "base")
    ended = weightlab("apply", "base", "exact.safetensors", "--out", "new")
    assert ended.code == 0
    assert ended.out.splitlines()[0] == "5 tensors computed, 5.32 kB written, 10 B copied"
    assert same(weights("new"), weights("tuned"))
    assert content(patches / "new") == content(patches / "tuned")
    assert content(patches / "base") == before


def test_what_is_said_as_json(weightlab: Weightlab, patches: Path) -> None:
    told = weightlab("apply", "base", "exact.safetensors@0.5", "-o", "new.safetensors", "--json").json
    assert told == {
        "model": "base",
        "out": "new.safetensors",
        "patches": [{"id": wl.open_patch("exact.safetensors").id, "name": "exact.safetensors", "scale": 0.5}],
        "tensors": 5,
        "bytes_written": 5316,
        "bytes_copied": 8,
        "left_out": [],
        "notes": [],
        "dry_run": False,
    }


@pytest.mark.parametrize("where", [(), ("--in-place", "-o", "new")])
def test_one_place_has_to_be_named(weightlab: Weightlab, patches: Path, where: tuple[str, ...]) -> None:
    before = content(patches)
    ended = weightlab("apply", "base", "exact.safetensors", *where)
    assert ended.code == 2 and ended.err.endswith("  → either --out PATH or --in-place\n")
    assert content(patches) == before


def test_several_patches_with_scales_are_a_sum(weightlab: Weightlab, patches: Path) -> None:
    words = ("exact.safetensors@0.5", "dense.safetensors@-0.25")
    assert weightlab("apply", "base", *words, "-o", "one").code == 0
    assert weightlab("apply", "base", *reversed(words), "-o", "two").code == 0
    assert content(patches / "one") == content(patches / "two")
    first, second, third = state(), state(1, 0.01), state(2, 0.1)
    for name, tensor in weights("one").items():
        if tensor.is_floating_point():
            expected = first[name] + 0.5 * (second[name] - first[name]) - 0.25 * (third[name] - first[name])
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
        else:
            assert tensor.equal(first[name])


@pytest.mark.parametrize(
    ("operand", "expected"),
    [
        ("p", 1.0),
        ("p@0.5", 0.5),
        ("p@-1", -1.0),
        ("p@+2", 2.0),
        ("p@1e-2", 0.01),
        ("p@.25", 0.25),
        ("./p@3", 3.0),
        ("q@2", 1.0),  # a path that exists wins as a whole
        ("q@2@0.5", 0.5),
        ("q@2@", "q@2@"),
        ("p@", "p@"),
        ("p@nan", "p@nan"),
        ("p@inf", "p@inf"),
        ("p@0.5@1", "p@0.5"),
        ("p@one", "p@one"),
        ("@1", "@1"),
    ],
)
def test_patch_at_scale(weightlab: Weightlab, patches: Path, operand: str, expected: float | str) -> None:
    """What follows the last @ is the scale if it is a finite number; otherwise the whole is a path."""
    shutil.copy("dense.safetensors", "p")
    shutil.copy("dense.safetensors", "q@2")
    ended = weightlab("apply", "base", operand, "--in-place", "--json")
    if isinstance(expected, str):
        assert ended.error["exit_code"] == 3 and ended.error["message"] == f"{expected}: no such patch"
    else:
        (found,) = ended.json["patches"]
        assert found["name"] == ("q@2" if operand.startswith("q") else "p")
        assert found["scale"] == pytest.approx(expected, rel=1e-7)


def test_a_revision_that_could_be_a_scale_is_refused(weightlab: Weightlab, patches: Path) -> None:
    ended = weightlab("apply", "base", "hf://org/name@0.5", "--in-place")
    assert ended.code == 2
    assert ended.err.splitlines()[1] == "  → write hf://org/name@main@0.5 or hf://org/name@0.5@1"
    for clear in ("hf://org/name@main@0.5", "hf://org/name@0.5@1", "hf://org/name", "hf://org/name@main"):
        ended = weightlab("apply", "base", clear, "--in-place")
        assert ended.code == 3 and "download the patch first" in ended.err


def test_a_scale_beyond_fp32_is_refused(weightlab: Weightlab, patches: Path) -> None:
    before = content(patches)
    assert weightlab("apply", "base", "dense.safetensors@1e39", "--in-place").code == 2
    assert content(patches) == before


def test_a_patch_that_is_on_already(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    before = content(patches)
    ended = weightlab("apply", "base", "exact.safetensors@0.5", "--in-place")
    assert ended.code == 4 and "weightlab scale base PATCH SCALE" in ended.err
    assert weightlab("apply", "base", "exact.safetensors", "-o", "new").code == 4
    assert weightlab("apply", "tuned", "dense.safetensors", "dense.safetensors", "-o", "new").code == 4
    assert content(patches) == before


def test_an_exact_patch_on_another_base_names_both_digests(weightlab: Weightlab, patches: Path) -> None:
    before = content(patches)
    records = wl.open_patch("exact.safetensors").records
    for where in (("--in-place",), ("-o", "new")):
        error = weightlab("apply", "other.safetensors", "exact.safetensors", *where, "--json").error
        assert error["exit_code"] == 4 and len(error["offenders"]) == 5
        for line in error["offenders"]:
            assert str(records[line.partition(":")[0]].base_digest) in line
    assert content(patches) == before


def test_misfits_come_before_the_first_byte(weightlab: Weightlab, patches: Path) -> None:
    save_file({"embed.weight": torch.zeros(24, 16), "layers.0.bias": torch.zeros(3)}, patches / "small.safetensors")
    before = content(patches)
    for where in (("--in-place",), ("-o", "new.safetensors")):
        error = weightlab("apply", "small.safetensors", "dense.safetensors", *where, "--json").error
        assert error["exit_code"] == 4
        found = {re.split("[ :]", line)[0] for line in error["offenders"]}
        assert found == {"layers.0.bias", "layers.0.weight", "layers.1.conv", "temperature"}
    assert content(patches) == before


@pytest.mark.parametrize("where", [("--in-place",), ("-o", "new"), ("-o", "new.safetensors")])
def test_a_dry_run_checks_all_and_writes_nothing(weightlab: Weightlab, patches: Path, where: tuple[str, ...]) -> None:
    assert weightlab("apply", "base", "dense.safetensors@0.5", "--in-place").code == 0
    before = content(patches)
    told = weightlab("apply", "base", "exact.safetensors", *where, "--dry-run", "--json").json
    ended = weightlab("apply", "base", "exact.safetensors", *where, "--dry-run")
    assert ended.code == 0 and "of memory, with" in ended.out and "nothing was written (dry run)" in ended.out
    assert weightlab("apply", "other.safetensors", "exact.safetensors", *where, "--dry-run").code == 4
    assert content(patches) == before
    made = weightlab("apply", "base", "exact.safetensors", *where, "--json").json
    assert told["dry_run"] and told["memory"] > 2**28 and not made["dry_run"]
    for key in ("model", "out", "patches", "tensors", "bytes_written", "left_out"):
        assert told[key] == made[key]


def test_include_and_exclude(weightlab: Weightlab, patches: Path) -> None:
    words = ("--include", "layers.*", "--exclude", "*.bias")
    assert weightlab("apply", "base", "exact.safetensors", "--in-place", *words).code == 0
    base, tuned, found = state(), state(1, 0.01), weights("base")
    for name in base:
        assert found[name].equal((tuned if name in ("layers.0.weight", "layers.1.conv") else base)[name])
    ended = weightlab("apply", "base", "dense.safetensors", "--in-place", "--include", "nothing*")
    assert ended.code == 2 and "'nothing*'" in ended.err


def test_map_renames_prefixes(weightlab: Weightlab, patches: Path) -> None:
    save_file({f"model.{n}": t for n, t in weights("base").items()}, patches / "wrapped.safetensors")
    assert weightlab("apply", "wrapped.safetensors", "exact.safetensors", "--in-place").code == 4
    assert weightlab("apply", "wrapped.safetensors", "exact.safetensors", "--in-place", "--map", "=model.").code == 0
    assert same({n.removeprefix("model."): t for n, t in weights("wrapped.safetensors").items()}, weights("tuned"))


def test_a_pickle_becomes_safetensors(weightlab: Weightlab, patches: Path) -> None:
    torch.save({"model": {"state_dict": state()}}, "checkpoint.pt")
    assert weightlab("apply", "checkpoint.pt", "-o", "plain.safetensors").code == 0
    assert same(weights("plain.safetensors"), weights("base"))
    assert weightlab("apply", "checkpoint.pt", "exact.safetensors", "-o", "patched.safetensors").code == 0
    assert same(weights("patched.safetensors"), weights("tuned"))
    ended = weightlab("apply", "checkpoint.pt", "exact.safetensors", "--in-place")
    assert ended.code == 4 and "--out" in ended.err


def test_weights_in_other_formats_are_named_and_left_out(weightlab: Weightlab, patches: Path) -> None:
    (patches / "base" / "model.onnx").write_text("the same weights")
    ended = weightlab("apply", "base", "exact.safetensors", "-o", "new")
    assert "left out: model.onnx (other weights, without the patch)" in ended.out.splitlines()
    assert not (patches / "new" / "model.onnx").exists()


def test_links_are_refused_or_copied(weightlab: Weightlab, patches: Path) -> None:
    shutil.copytree("base", "linked")
    os.unlink("linked/model.safetensors")
    os.symlink("../base/model.safetensors", "linked/model.safetensors")
    before = content(patches)
    ended = weightlab("apply", "linked", "exact.safetensors", "--in-place")
    assert ended.code == 4 and "--links copy" in ended.err and "  model.safetensors\n" in ended.err
    assert content(patches) == before
    assert weightlab("apply", "linked", "exact.safetensors", "--in-place", "--links", "copy").code == 0
    assert same(weights("linked"), weights("tuned")) and same(weights("base"), state())


def test_nan_in_a_result_is_refused_unless_it_is_allowed(weightlab: Weightlab, patches: Path) -> None:
    bad = state()
    bad["embed.weight"][3, 3] = torch.nan
    save_file(bad, patches / "bad.safetensors")
    before = content(patches)
    ended = weightlab("apply", "bad.safetensors", "dense.safetensors", "--in-place")
    assert ended.code == 3 and "embed.weight" in ended.err
    assert content(patches) == before
    assert weightlab("apply", "bad.safetensors", "dense.safetensors", "--in-place", "--allow-nonfinite").code == 0
    assert weights("bad.safetensors")["embed.weight"].isnan().sum() == 1


def test_one_at_a_time_and_how_to_wait(weightlab: Weightlab, patches: Path) -> None:
    lock = os.open("base", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = content(patches)
    for words in (("--in-place",), ("-o", "new")):
        ended = weightlab("apply", "base", "exact.safetensors", *words)
        assert ended.code == 6 and "--wait SECONDS" in ended.err
    assert content(patches) == before
    timer = threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
    timer.start()
    assert weightlab("apply", "base", "exact.safetensors", "--in-place", "--wait", "60").code == 0
    timer.join()
    os.close(lock)
    assert same(weights("base"), weights("tuned"))


@pytest.mark.parametrize("threads", [1, 4])
def test_any_number_of_threads_gives_the_same_bytes(weightlab: Weightlab, patches: Path, threads: int) -> None:
    words = ("apply", "base", "exact.safetensors@0.3", "dense.safetensors@0.7", "--json")
    assert weightlab(*words, "-o", "two.safetensors", "--threads", "2").code == 0
    assert weightlab(*words, "-o", "other_number.safetensors", "--threads", str(threads)).code == 0
    assert Path("two.safetensors").read_bytes() == Path("other_number.safetensors").read_bytes()


@pytest.mark.parametrize("path", ["new", "new.safetensors"])
def test_output_never_goes_over_what_is_there(weightlab: Weightlab, patches: Path, path: str) -> None:
    if path == "new":
        (patches / "new").mkdir()
        (patches / "new" / "mine").write_text("mine")
    else:
        (patches / path).write_text("mine")
    before = content(patches)
    assert weightlab("apply", "base", "exact.safetensors", "-o", path).code == 4
    assert weightlab("apply", "base", "exact.safetensors", "-o", "no/such/folder").code == 7
    assert weightlab("apply", "base", "exact.safetensors", "-o", "base/inside").code == 2
    assert content(patches) == before


@pytest.mark.parametrize("operand", ["base", "config", "nothing", "adapter"])
def test_what_is_no_patch(weightlab: Weightlab, patches: Path, operand: str) -> None:
    Path("config").write_text("{}")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    before = content(patches)
    ended = weightlab("apply", "base", operand, "--in-place")
    assert ended.code == 3 and operand in ended.err.splitlines()[0]
    assert content(patches) == before


def test_a_real_pair(weightlab: Weightlab, chgnet_safetensors: Mapping[str, Path], place: Path) -> None:
    shutil.copy(chgnet_safetensors["0.3.0"], "model.safetensors")
    before = Path("model.safetensors").read_bytes()
    assert weightlab("diff", "model.safetensors", chgnet_safetensors["r2scan"], "-o", "p.safetensors").code == 0
    assert weightlab("apply", "model.safetensors", "p.safetensors", "--in-place").code == 0
    expected = tensors_of(chgnet_safetensors["r2scan"])
    found = tensors_of(Path("model.safetensors"))
    assert len(found) == 136
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert weightlab("diff", "model.safetensors", chgnet_safetensors["r2scan"], "--exit-code").code == 0
    assert weightlab("remove", "model.safetensors", "p.safetensors").code == 0
    assert Path("model.safetensors").read_bytes() == before and not Path(".weightlab").exists()
