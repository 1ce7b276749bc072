"""`weightlab verify`."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import overwrite, place_of, state


def flip(patch: str, name: str, part: str) -> None:
    """Flips one bit in the middle of a part."""
    offset, length = place_of(Path(patch), name, part)
    position = offset + length // 2
    overwrite(Path(patch), position, bytes([Path(patch).read_bytes()[position] ^ 16]))


def test_a_patch(weightlab: Weightlab, patches: Path) -> None:
    ended = weightlab("verify", "exact.safetensors")
    identity = wl.open_patch("exact.safetensors").id
    assert ended.code == 0
    assert ended.out.splitlines()[0].startswith("exact.safetensors: whole (5 tensors, ")
    assert ended.out.splitlines()[1] == f"id: {identity}"
    (told,) = weightlab("verify", "exact.safetensors", "--json").json["verified"]
    assert (told["kind"], told["identity"], told["tensors"], told["clean"]) == ("patch", identity, 5, None)


def test_a_patch_and_its_base(weightlab: Weightlab, patches: Path) -> None:
    ended = weightlab("verify", "exact.safetensors", "dense.safetensors", "--base", "base")
    assert ended.code == 0 and ended.out.count("base is its base") == 2
    error = weightlab("verify", "exact.safetensors", "--base", "tuned", "--json").error
    assert error["exit_code"] == 4 and len(error["offenders"]) == 5
    record = wl.open_patch("exact.safetensors").records["embed.weight"]
    (line,) = (o for o in error["offenders"] if o.startswith("embed.weight: "))
    assert str(record.base_digest) in line and str(record.result_digest) in line


def test_a_fingerprint_does_not_depend_on_the_files(weightlab: Weightlab, place: Path) -> None:
    (place / "shards").mkdir()
    tensors = state()
    names = sorted(tensors)
    where = {n: f"model-0000{1 + (i > 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, place / "shards" / file)
    (place / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    told = weightlab("verify", "base", "shards", "tuned", "--json").json["verified"]
    assert [t["path"] for t in told] == ["base", "shards", "tuned"]
    assert told[0]["identity"] == told[1]["identity"] != told[2]["identity"]


def test_a_checkpoint_with_patches_on_it(weightlab: Weightlab, patches: Path) -> None:
    (clean, tuned) = weightlab("verify", "base", "tuned", "--json").json["verified"]
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    (told,) = weightlab("verify", "base", "--json").json["verified"]
    assert (told["identity"], told["clean"]) == (tuned["identity"], clean["identity"])
    ended = weightlab("verify", "base")
    assert f"without its patches: {clean['identity']}" in ended.out.splitlines()


@pytest.mark.parametrize(("patch", "part"), [("exact.safetensors", "frames"), ("dense.safetensors", "delta")])
def test_a_flipped_bit_in_a_part(weightlab: Weightlab, patches: Path, patch: str, part: str) -> None:
    flip(patch, "layers.0.weight", part)
    before = content(patches)
    ended = weightlab("verify", patch)
    assert ended.code == 5 and "layers.0.weight" in ended.err and "embed" not in ended.err
    assert weightlab("apply", "base", patch, "--in-place").code == 5
    assert weightlab("apply", "base", patch, "-o", "new").code == 5
    assert content(patches) == before


def test_a_flipped_bit_in_kept_bytes(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    (kept,) = (patches / "base" / ".weightlab").rglob("originals/*.bin")
    overwrite(kept, 100, bytes([kept.read_bytes()[100] ^ 1]))
    ended = weightlab("verify", "base")
    assert ended.code == 5 and "kept clean bytes are damaged" in ended.err


def test_a_checkpoint_that_something_else_changed(weightlab: Weightlab, patches: Path) -> None:
    assert weightlab("apply", "base", "exact.safetensors", "--in-place").code == 0
    model = patches / "base" / "model.safetensors"
    start = 8 + struct.unpack("<Q", model.read_bytes()[:8])[0]
    overwrite(model, start + 20, bytes([model.read_bytes()[start + 20] ^ 1]))
    ended = weightlab("verify", "base")
    assert ended.code == 5 and "something else changed it" in ended.err


def test_of_several_all_are_checked_and_all_faults_told(weightlab: Weightlab, patches: Path) -> None:
    flip("exact.safetensors", "embed.weight", "frames")
    ended = weightlab("verify", "exact.safetensors", "base", "nothing", "dense.safetensors")
    assert ended.code == 5  # of the first that failed
    assert [line for line in ended.out.splitlines() if ": whole (" in line] == [
        line for line in ended.out.splitlines() if line.startswith(("base:", "dense.safetensors:"))
    ]
    assert ended.err.splitlines()[0] == "error: 2 of 4 did not pass"
    assert "    embed.weight" in ended.err and "  nothing: no such file or folder" in ended.err
    error = weightlab("verify", "nothing", "exact.safetensors", "--json").error
    assert error["exit_code"] == 3 and len(error["offenders"]) == 3


def test_a_dry_run_says_how_much_it_would_read(weightlab: Weightlab, patches: Path) -> None:
    flip("exact.safetensors", "embed.weight", "frames")
    told = weightlab("verify", "exact.safetensors", "--base", "base", "--dry-run", "--json").json
    assert [(r["path"], r["kind"], r["tensors"]) for r in told["read"]] == [
        ("exact.safetensors", "patch", 5),
        ("base", "checkpoint", 6),
    ]
    assert told["read"][1]["bytes"] == 5324 and told["memory"] > 2**28
    assert "base: a checkpoint, 6 tensors, 5.32 kB to read" in weightlab("verify", "base", "--dry-run").out


@pytest.mark.parametrize(
    ("words", "code"),
    [((), 2), (("base", "--base", "tuned"), 2), (("nothing",), 3), (("nothing", "--base", "base"), 3)],
)
def test_what_makes_no_sense(weightlab: Weightlab, patches: Path, words: tuple[str, ...], code: int) -> None:
    assert weightlab("verify", *words).code == code
