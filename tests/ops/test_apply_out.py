"""`apply --out`: a new checkpoint beside the old one, from all kinds of models and patches."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, NonFiniteError, NotPatchableError, RangeError, UsageError, WrongBaseError

State = dict[str, Tensor]


def state(seed: int = 0, change: float = 0.0, dtype: torch.dtype = torch.float32) -> State:
    fixed, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    shapes = {"embed": (12, 8), "layers.0.w": (8, 8), "layers.0.b": (8,), "layers.1.w": (6, 8)}
    found = {n: torch.randn(s, generator=fixed) for n, s in shapes.items()}
    found = {n: (t + change * torch.randn(t.shape, generator=own)).to(dtype) for n, t in found.items()}
    return found | {"steps": torch.tensor([7])}


SHARDS = {
    "model-00001-of-00002.safetensors": ["embed", "steps"],
    "model-00002-of-00002.safetensors": ["layers.0.w", "layers.0.b", "layers.1.w"],
}


def sharded(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    for file, names in SHARDS.items():
        save_file({n: tensors[n] for n in names}, folder / file, {"format": "pt", "made_by": "me"})
    index = {
        "metadata": {"total_size": 1, "total_parameters": 5},
        "weight_map": {n: f for f, names in SHARDS.items() for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_in(path: Path) -> State:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {n: t for f in files for n, t in load_file(f).items()}


def same(a: State, b: State) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def hashes(path: Path) -> dict[str, str]:
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_shards_that_no_patch_touches_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    patch = wl.diff(state(), state(1, 0.1), encode="exact", include="layers.*")
    outcome = wl.apply(base, patch, out=tmp_path / "out")
    first, second = SHARDS
    assert (base / first).read_bytes() == (tmp_path / "out" / first).read_bytes()
    assert (base / second).read_bytes() != (tmp_path / "out" / second).read_bytes()
    right = state() | {n: t for n, t in state(1, 0.1).items() if n.startswith("layers")}
    assert same(tensors_in(tmp_path / "out"), right)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in right.values()), "total_parameters": 5}
    with safe_open(tmp_path / "out" / second, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made_by": "me"}
    assert (outcome.tensors, outcome.out, outcome.model) == (3, str(tmp_path / "out"), str(base))
    assert outcome.bytes_written == sum(right[n].nbytes for n in SHARDS[second])
    assert not (tmp_path / "out" / ".weightlab").exists()


@pytest.mark.parametrize("out", ["new", "new.safetensors"])
@pytest.mark.parametrize("model", ["m.safetensors", "m.pt", "m"])
def test_one_file_of_any_kind(tmp_path: Path, model: str, out: str) -> None:
    path = tmp_path / model
    if model == "m":
        path.mkdir()
        save_file(state(), path / "model.safetensors")
    elif model == "m.pt":
        torch.save({"state_dict": state(), "epoch": 1}, path)
    else:
        save_file(state(), path)
    wl.apply(path, wl.diff(state(), state(1, 0.1)), out=tmp_path / out)
    assert same(tensors_in(tmp_path / out), state(1, 0.1))
    if out == "new":
        name = "m.safetensors" if model == "m.safetensors" else "model.safetensors"  # a file keeps its name
        assert [p.name for p in (tmp_path / out).iterdir()] == [name]


def test_without_a_patch_it_is_a_copy_as_safetensors(tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    torch.save({"a": shared, "b": shared, "c": torch.ones(2).t()}, tmp_path / "m.bin")
    wl.apply(tmp_path / "m.bin", out=tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), {"a": shared, "c": torch.ones(2)})
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata()["b"] == "a"  # as the safetensors library notes what was shared


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    kept = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "code/modeling_x.py",
        "README.md",
        "onnx/config.json",
        "original/params.json",
    ]
    left = [
        *("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "onnx/model.onnx", "tf_model.h5"),
        *("training_args.bin", "trainer_state.json", "optimizer.pt", "rng_state_0.pth", "model.fp16.safetensors"),
        *("original/consolidated.00.pth", "a/b/c/weights.safetensors", "pytorch_model-00001-of-00002.bin"),
        *("pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "openvino/openvino_model.bin"),
        *("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"),
    ]
    trainers = ["checkpoint-20/optimizer.pt", "checkpoint-20/config.json", "sub/global_step7/x.pt", "runs/now/events"]
    for name in [*kept, *left, *trainers, ".git/config", ".cache/x", "x.partial"]:
        (base / name).parent.mkdir(exist_ok=True, parents=True)
        (base / name).write_bytes(b"{}" if name.endswith("config.json") else name.encode() + bytes([0, 255]))
    outcome = wl.apply(base, wl.diff(state(), state(1, 0.1)), out=tmp_path / "out")
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(outcome.left_out) == sorted([*left, "checkpoint-20/", "sub/global_step7/", "runs/"])
    assert set(hashes(tmp_path / "out")) == {*kept, *SHARDS, "model.safetensors.index.json"}


def test_a_link_that_points_nowhere_is_named(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    (base / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(wl.WeightlabError, match="point nowhere") as failed:
        wl.apply(base, wl.diff(state(), state(1, 0.1)), out=tmp_path / "out")
    assert failed.value.offenders == ("tokenizer.json",) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("encode", ["exact", "dense", "low_rank:2"])
def test_on_a_stack_it_gives_what_in_place_would(tmp_path: Path, encode: str) -> None:
    base = sharded(tmp_path / "base", state())
    one = wl.diff(state(), state(1, 0.1), tmp_path / "one.safetensors", encode=encode)
    two = wl.diff(state(), state(2, 0.1), tmp_path / "two.safetensors", encode="dense", include=["layers.*"])
    wl.apply(base, 0.5 * one, in_place=True)
    before = hashes(base)
    outcome = wl.apply(base, -two, out=tmp_path / "out")
    assert hashes(base) == before
    assert {(p.name, p.scale) for p in outcome.patches} == {("one.safetensors", 0.5), ("two.safetensors", -1.0)}
    wl.apply(base, -two, in_place=True)
    assert same(tensors_in(tmp_path / "out"), tensors_in(base))


def test_scales_and_several_patches_against_the_formula(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    one = wl.diff(state(), state(1, 0.1), tmp_path / "one.safetensors", encode="dense:fp32")
    two = wl.diff(state(), state(2, 0.1), tmp_path / "two.safetensors", encode="dense:fp32")
    wl.apply(base, [f"{tmp_path}/one.safetensors@0.25", two * -3], out=tmp_path / "out")
    terms = sorted(((one.id, 0.25, 1), (two.id, -3.0, 2)))
    for name, found in tensors_in(tmp_path / "out").items():
        expected = state()[name]
        if name != "steps":
            total = expected.clone()
            for _, scale, seed in terms:
                total = total + (state(seed, 0.1)[name] - expected) * torch.tensor(scale)
            expected = total
        assert torch.equal(found, expected), name


def test_include_exclude_and_other_names(tmp_path: Path) -> None:
    save_file({f"model.{n}": t for n, t in state().items()}, tmp_path / "m.safetensors")
    patch = wl.diff(state(), state(1, 0.1), encode="dense:fp32")
    options: dict[str, Any] = {"renames": {"": "model."}, "include": "model.layers.*", "exclude": ["*.b"]}
    wl.apply(tmp_path / "m.safetensors", patch, out=tmp_path / "out.safetensors", **options)
    found = load_file(tmp_path / "out.safetensors")
    moved = [n for n, t in found.items() if not torch.equal(t, state()[n.removeprefix("model.")])]
    assert moved == ["model.layers.0.w", "model.layers.1.w"]
    with pytest.raises(UsageError, match="match no tensor"):
        wl.apply(tmp_path / "m.safetensors", patch, out=tmp_path / "no", renames={"": "model."}, include="*.q")


def test_tensors_that_come_go_and_grow(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    tuned = state(1, 0.1)
    tuned["embed"] = torch.cat([tuned["embed"], torch.ones(3, 8)])
    tuned["new.w"] = torch.randn(2, 2)
    del tuned["layers.0.b"]
    for encode in ("exact", "dense:fp32"):
        patch = wl.diff(state(), tuned, encode=encode, allow=["added", "removed", "rows"])
        out = tmp_path / encode.replace(":", "-")
        wl.apply(base, patch, out=out)
        found = tensors_in(out)
        assert set(found) == set(tuned) and all(torch.allclose(found[n], tuned[n], atol=1e-6) for n in tuned)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tuned)
        with pytest.raises(NotPatchableError, match="cannot be done in place"):
            wl.apply(base, patch, in_place=True)


@pytest.mark.parametrize(("encode", "dtype"), [("dense:fp32", torch.bfloat16), ("exact", torch.float32)])
def test_a_bf16_base_and_an_fp32_fine_tune(tmp_path: Path, encode: str, dtype: torch.dtype) -> None:
    base = sharded(tmp_path / "base", state(dtype=torch.bfloat16))
    patch = wl.diff(state(dtype=torch.bfloat16), state(1, 0.1), encode=encode)
    wl.apply(base, patch, out=tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert all(torch.equal(t, state(1, 0.1)[n].to(t.dtype)) for n, t in found.items())
    assert found["embed"].dtype == dtype  # exact keeps the tuned dtype, the others the base's


def test_nothing_is_left_of_a_run_that_fails_and_all_offenders_are_listed(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state(dtype=torch.float16))
    wide = {n: t.float() for n, t in state().items()}
    far = wl.diff(
        wide,
        {n: t + 60000.0 if n != "steps" else t for n, t in wide.items()},
        encode="dense:fp32",
        include=["layers.*", "embed"],
    )
    before = hashes(tmp_path)
    with pytest.raises(RangeError) as overflowed:
        wl.apply(base, 3 * far, out=tmp_path / "out")
    assert [o.split(" ")[0] for o in overflowed.value.offenders] == ["embed", "layers.0.b", "layers.0.w", "layers.1.w"]
    poisoned = {n: t.clone() for n, t in state().items()}
    poisoned["embed"][0, 0], poisoned["layers.0.b"][3] = float("nan"), float("inf")
    save_file(poisoned, tmp_path / "poisoned.safetensors")
    before = hashes(tmp_path)
    small = wl.diff(state(), state(1, 0.1), encode="dense:fp32")
    with pytest.raises(NonFiniteError) as bad:
        wl.apply(tmp_path / "poisoned.safetensors", small, out=tmp_path / "out")
    assert [o.split(" ")[0] for o in bad.value.offenders] == ["embed", "layers.0.b"]
    with pytest.raises(WrongBaseError) as wrong:
        wl.apply(tmp_path / "poisoned.safetensors", wl.diff(state(), state(1, 0.1)), out=tmp_path / "out")
    assert len(wrong.value.offenders) == 2
    for offender in wrong.value.offenders:
        assert sum(len(word.strip(",")) == 64 for word in offender.split()) == 2  # both digests
    with pytest.raises(MisfitError) as misfit:
        wl.apply(
            base,
            wl.diff({"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.zeros(2), "b": torch.zeros(3)}),
            out=tmp_path / "out",
        )
    assert len(misfit.value.offenders) == 2
    assert hashes(tmp_path) == before
    wl.apply(tmp_path / "poisoned.safetensors", small, out=tmp_path / "out", allow_nonfinite=True)


def test_where_it_may_not_go(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    patch = wl.diff(state(), state(1, 0.1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(NotPatchableError, match="exists already"):
        wl.apply(base, patch, out=tmp_path / "full")
    with pytest.raises(UsageError, match="lies inside"):
        wl.apply(base, patch, out=base / "out")
    with pytest.raises(UsageError, match="has several files"):
        wl.apply(base, patch, out=tmp_path / "one.safetensors")
    with pytest.raises(UsageError):
        wl.apply(base, patch)
    with pytest.raises(UsageError):
        wl.apply(base, patch, out=tmp_path / "out", in_place=True)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "full"}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", state())
    before = hashes(tmp_path)
    outcome = wl.apply(base, wl.diff(state(), state(1, 0.1)), out=tmp_path / "out", dry_run=True)
    assert outcome.dry_run and outcome.tensors == 4 and hashes(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_model_folder_under_a_symbolic_link(tmp_path: Path) -> None:
    sharded(tmp_path / "base", state())
    (tmp_path / "link").symlink_to("base")
    wl.apply(tmp_path / "link", wl.diff(state(), state(1, 0.1)), out=tmp_path / "out")
    assert same(tensors_in(tmp_path / "out"), state(1, 0.1))
    shutil.rmtree(tmp_path / "out")
