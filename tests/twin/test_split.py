"""Experts taken apart: the shared part, exclusive parts, heads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import (
    IntegrityError,
    MisfitError,
    MissingInputError,
    NamesMismatchError,
    UsageError,
    WrongBaseError,
)

State = dict[str, Tensor]


def random(seed: int, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (30, 16), "layer.weight": (24, 16), "layer.bias": (24,), "norm.weight": (16,)}
    return {name: scale * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def near(base: State, seed: int) -> State:
    change = random(seed, 0.1)
    return {n: (t.float() + change[n]).to(t.dtype) for n, t in base.items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and three experts, each with a classifier of its own."""
    base = random(0)
    made = [save(tmp_path / "base", {**base, "steps": torch.tensor([0])})]
    for seed, labels in ((1, 2), (2, 2), (3, 5)):
        head = {"classifier.weight": torch.full((labels, 16), float(seed))}
        state = {**near(base, seed), **head, "steps": torch.tensor([seed])}
        made.append(save(tmp_path / f"expert{seed}", state, num_labels=labels))
    return made


def on_base(twin: wl.Twin, base: Path) -> State:
    state = {n: t for n, t in load_file(base / "model.safetensors").items() if t.is_floating_point()}
    return wl.apply(state, twin.shared)


def test_the_formula(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="dense")
    start, *tuned = (load_file(m / "model.safetensors") for m in models)
    shared = on_base(twin, base)
    for name in shared:
        b, *theirs = (state[name].double() for state in (start, *tuned))
        meant = b + 0.3 * sum(t - b for t in theirs)
        torch.testing.assert_close(shared[name].double(), meant, rtol=0, atol=1e-6)
    for name, expert in zip(twin.names, tuned, strict=True):
        assert twin.heads(name) == ["classifier.weight"]
        restored = wl.apply(shared, twin.exclusive[name])
        assert restored.keys() == shared.keys() | {"classifier.weight"}
        assert all(torch.allclose(restored[n], expert[n], rtol=0, atol=1e-6) for n in restored)
        assert torch.equal(restored["classifier.weight"], expert["classifier.weight"])
    assert json.loads((twin.path / "experts" / "expert3" / "config.json").read_text())["num_labels"] == 5
    assert twin.header.method["lambda"] == 0.3 and len(twin.header.method["experts"]) == 3
    assert twin.shared.header.kind == "shared" and twin.exclusive["expert1"].header.kind == "exclusive"
    assert twin.exclusive["expert1"].header.base.fingerprint == twin.header.result


@pytest.mark.parametrize(
    ("compress", "encoding"),
    [("low_rank:2", "low_rank"), ("energy:0.5", "low_rank"), ("sparse:0.1", "sparse"), ("random:0.1", "sparse")],
)
def test_compressed_parts(models: list[Path], tmp_path: Path, compress: str, encoding: str) -> None:
    base, *experts = models
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress=compress)
    for patch in twin.exclusive.values():
        kinds = {n: r.encoding for n, r in patch.records.items()}
        assert kinds["layer.weight"] == kinds["embed.weight"] == encoding
        assert kinds["layer.bias"] == kinds["norm.weight"] == "dense" and kinds["classifier.weight"] == "exact"
        error = patch.records["layer.weight"].error
        assert error is not None and 0 < error.relative_l2 < (4.0 if compress.startswith("random") else 1.0)
        assert patch.nbytes() < sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    assert set(twin.sizes()) == {"shared", *twin.names}


def test_a_rank_is_never_zero(tmp_path: Path) -> None:
    base = {"w": torch.zeros(40, 1), "v": torch.zeros(40, 30)}
    experts = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    paths = [save(tmp_path / str(i), state) for i, state in enumerate([base, *experts])]
    twin = wl.twin_split(paths[0], paths[1:], tmp_path / "twin", compress="energy:0.01")
    for patch in twin.exclusive.values():
        assert set(patch.records) == {"w", "v"} and patch.records["v"].parameters["rank"] >= 1


@pytest.mark.parametrize(
    ("method", "parameters"), [("ties", {"density": 0.2}), ("linear", {}), ("dare_ties", {"density": 0.5})]
)
def test_any_method_and_any_order(models: list[Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    base, *experts = models
    one = wl.twin_split(base, experts, tmp_path / "one", method=method, parameters=parameters)
    two = wl.twin_split(base, experts[::-1], tmp_path / "two", method=method, parameters=parameters)
    assert one.shared.id == two.shared.id and one.header.result == two.header.result
    assert {n: p.id for n, p in one.exclusive.items()} == {n: p.id for n, p in two.exclusive.items()}
    merged = wl.merge(
        base, [without_head(e, tmp_path) for e in experts], tmp_path / "merged", method=method, parameters=parameters
    )
    assert merged.tensors == 4
    found = load_file(tmp_path / "merged" / "model.safetensors")
    shared = on_base(one, base)
    assert all(torch.allclose(found[n], t, rtol=0, atol=1e-6) for n, t in shared.items()) or method == "dare_ties"


def without_head(expert: Path, place: Path) -> Path:
    state = load_file(expert / "model.safetensors")
    del state["classifier.weight"]
    return save(place / f"{expert.name}-headless", state)


def test_bf16_bases_and_patches_as_experts(tmp_path: Path) -> None:
    base = {n: t.bfloat16() for n, t in random(0).items()}
    folder = save(tmp_path / "base", base)
    patches: list[Path] = []
    for seed in (1, 2):
        patch = wl.diff(base, {n: t + 0.1 * random(seed)[n] for n, t in random(0).items()}, encode="dense:fp32")
        patches.append(tmp_path / f"p{seed}.safetensors")
        patch.save(patches[-1])
    twin = wl.twin_split(folder, {"a": patches[0], "b": patches[1]}, tmp_path / "twin", compress="dense:fp32")
    shared = on_base(twin, folder)
    for name, path in (("a", patches[0]), ("b", patches[1])):
        wanted = wl.open_patch(path)
        exclusive = twin.exclusive[name]
        zero = {n: torch.zeros(t.shape) for n, t in base.items()}
        delta, rest = wl.apply(zero, wanted), wl.apply(zero, exclusive)
        for n, t in shared.items():  # base + Δ = shared + exclusive, though the shared model is rounded
            assert t.dtype == torch.bfloat16
            torch.testing.assert_close(t.float() + rest[n], base[n].float() + delta[n], rtol=0, atol=1e-6)


def test_what_does_not_fit_is_listed(models: list[Path], tmp_path: Path) -> None:
    base, one, two, _ = models
    state = load_file(two / "model.safetensors")
    del state["layer.bias"], state["norm.weight"]
    lacking = save(tmp_path / "lacking", state)
    with pytest.raises(NamesMismatchError) as error:
        wl.twin_split(base, [one, lacking], tmp_path / "twin")
    assert len(error.value.offenders) == 2 and "lacking" in error.value.offenders[0]
    with pytest.raises(UsageError, match="same name"):
        wl.twin_split(base, [one, tmp_path / ".." / tmp_path.name / "expert1"], tmp_path / "twin")
    with pytest.raises(UsageError, match="two experts"):
        wl.twin_split(base, [one], tmp_path / "twin")
    with pytest.raises(UsageError, match="exact"):
        wl.twin_split(base, [one, two], tmp_path / "twin", compress="exact")
    with pytest.raises(UsageError, match="weights"):
        wl.twin_split(base, [one, two], tmp_path / "twin", weights=[1])
    codes = save(tmp_path / "codes", {n: t.to(torch.int8) if n == "layer.weight" else t for n, t in state.items()})
    with pytest.raises((NamesMismatchError, MisfitError)):
        wl.twin_split(base, [one, codes], tmp_path / "twin")
    with pytest.raises(UsageError, match="no names for experts"):  # it would be taken for the shared part
        wl.twin_split(base, {"one": one, "shared": two}, tmp_path / "twin")
    assert not (tmp_path / "twin").exists() and not list(tmp_path.glob(".twin*"))


def test_a_folder_that_is_not_whole(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    twin = wl.twin_split(base, experts, tmp_path / "twin")
    assert wl.open_twin(twin.path).names == ["expert1", "expert2", "expert3"]
    assert twin.header.kept == ["steps"] and twin.header.left_out == []  # no sums of integers
    other = wl.twin_split(base, experts, tmp_path / "other", parameters={"lambda": 0.5})
    place = twin.path / "experts" / "expert2" / "exclusive"
    shutil.rmtree(place)
    with pytest.raises(MissingInputError, match="missing") as error:
        wl.open_twin(twin.path)
    assert "expert2" in error.value.offenders[0]
    shutil.copytree(other.path / "experts" / "expert2" / "exclusive", place)
    with pytest.raises(IntegrityError, match="another twin"):
        wl.open_twin(twin.path)
    with pytest.raises(MissingInputError, match="no twin"):
        wl.open_twin(base)


def test_an_exact_patch_of_another_base_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, one, two, _ = models
    wl.diff(one, two, tmp_path / "elsewhere.safetensors", include=["layer.weight"])
    with pytest.raises(WrongBaseError):
        wl.twin_split(base, [one, tmp_path / "elsewhere.safetensors"], tmp_path / "twin")
    assert not (tmp_path / "twin").exists()


def test_a_twin_in_the_folder_of_its_base(models: list[Path], tmp_path: Path) -> None:
    """What is another twin's, or half made, is none of the base's files; nor is a router, whoever it is from."""
    base, *experts = models
    (base / "router.json").write_text("{}")
    (base / "words").mkdir()
    (base / "words" / "vocab.txt").write_text("a")
    for name in ("one", "two"):
        twin = wl.twin_split(base, experts, base / name)
        beside = {str(f.relative_to(twin.path)) for f in twin.path.rglob("*") if f.is_file()}
        parts = {f for f in beside if f.startswith(("experts/", "shared/"))}
        assert beside - parts == {"twin.json", "config.json", "words/vocab.txt"}
        assert wl.open_twin(twin.path).names == ["expert1", "expert2", "expert3"]


def test_tied_weights_that_some_store_twice(tmp_path: Path) -> None:
    folders = []
    for seed, twice in enumerate((True, True, False)):
        state = near(random(0), seed) if seed else random(0)
        state = {**state, "head.weight": state["embed.weight"].clone()} if twice else state
        folders.append(save(tmp_path / f"m{seed}", state))
    twin = wl.twin_split(folders[0], folders[1:], tmp_path / "twin")
    assert twin.header.left_out == ["head.weight"]
    assert all("head.weight" not in patch.records for patch in (twin.shared, *twin.exclusive.values()))
    state = load_file(folders[2] / "model.safetensors")
    save_file({**state, "head.weight": 2 * state["embed.weight"]}, folders[2] / "model.safetensors")
    del state["embed.weight"]
    with pytest.raises(NamesMismatchError):  # which is no copy
        wl.twin_split(folders[2], [folders[0], save(tmp_path / "without", state)], tmp_path / "other")


def test_a_folder_that_is_reached_by_a_link(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down")
    twin = wl.twin_split(base, experts, tmp_path / "link" / "twin")
    assert (twin.path / str(twin.header.base["path"])).samefile(base)
