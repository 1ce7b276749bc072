"""Tied embeddings on disk: changed once where they are stored once, and together where they are stored twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from tests.cli.tools import content
from weightlab.errors import StackError, WeightlabError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ENCODE = ["exact", "dense", "sparse:0.3", "low_rank:2", "sign", "quantized:4"]


def parts(seed: int) -> dict[str, Tensor]:
    """A model in bf16 without its head; another seed moves every tensor a little."""
    generator, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = {EMBED: (30, 16), "model.layers.0.mlp.weight": (16, 16), "model.norm.weight": (16,)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return {n: (t + 0.05 * bool(seed) * torch.randn(t.shape, generator=moved)).bfloat16() for n, t in base.items()}


def written(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {n: tensors[n] for n in sorted(tensors)[index::shards]}
        save_file(chosen, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def twice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the head stored once more."""
    return {**tensors, HEAD: tensors[EMBED].clone()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encode", ENCODE)
@pytest.mark.parametrize("shards", [1, 2])
def test_stored_once_and_the_patch_is_of_a_pair_that_stores_both(place: Path, encode: str, shards: int) -> None:
    """The change counts once, not twice."""
    base, tuned = parts(0), parts(1)
    model = written(place / "model", base, shards, tie_word_embeddings=True)
    first = content(model)
    both = wl.diff(twice(base), twice(tuned), place / "p.safetensors", encode=encode)
    single = wl.diff(base, tuned, encode=encode)
    expected = wl.apply(base, single.at(0.5))
    outcome = wl.apply(model, both.at(0.5), in_place=True)
    assert outcome.tensors == 3 and HEAD not in loaded(model)
    assert all(t.equal(expected[n]) for n, t in loaded(model).items())
    wl.apply(written(place / "clean", base, shards), both.at(0.5), out=place / "new")
    assert all(t.equal(expected[n]) for n, t in loaded(place / "new").items())
    wl.scale(model, both, 1.0)
    expected = wl.apply(base, single)
    assert all(t.equal(expected[n]) for n, t in loaded(model).items())
    wl.remove(model, both)
    assert content(model) == first


@pytest.mark.parametrize("encode", ENCODE)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_stored_twice_and_the_patch_names_one(place: Path, encode: str, shards: int) -> None:
    """The other one follows, in whatever shard it lies, and comes back with it."""
    base, tuned = parts(0), parts(1)
    model = written(place / "model", twice(base), shards)
    first = content(model)
    patch = wl.diff(base, tuned, place / "p.safetensors", encode=encode)
    assert HEAD not in patch.records
    expected = wl.apply(base, patch.at(-0.5))
    outcome = wl.apply(model, patch.at(-0.5), in_place=True)
    assert outcome.tensors == 4
    found = loaded(model)
    assert found[HEAD].equal(found[EMBED]) and found[EMBED].equal(expected[EMBED])
    assert not found[EMBED].equal(base[EMBED])
    wl.apply(written(place / "clean", twice(base), shards), patch.at(-0.5), out=place / "new")
    assert all(t.equal(found[n]) for n, t in loaded(place / "new").items())
    wl.scale(model, patch, 1.0)
    expected = wl.apply(base, patch)
    assert loaded(model)[HEAD].equal(expected[EMBED])
    wl.remove(model, patch)
    assert content(model) == first


def test_two_patches_and_a_follower(place: Path) -> None:
    """The head follows both patches, or the one that is left."""
    base = parts(0)
    model = written(place / "model", twice(base))
    first = content(model)
    one = wl.diff(base, parts(1), place / "one.safetensors")
    two = wl.diff(base, parts(2), place / "two.safetensors", encode="dense")
    wl.apply(model, one, in_place=True)
    assert loaded(model)[HEAD].equal(parts(1)[EMBED])
    wl.apply(model, two, in_place=True)
    both = wl.apply(base, [one, two])[EMBED]
    assert loaded(model)[HEAD].equal(both) and loaded(model)[EMBED].equal(both)
    wl.remove(model, one)
    left = wl.apply(base, two)[EMBED]
    assert loaded(model)[HEAD].equal(left) and loaded(model)[EMBED].equal(left)
    wl.remove(model, two)
    assert content(model) == first


def test_the_follower_may_be_left_out(place: Path) -> None:
    base = parts(0)
    model = written(place / "model", twice(base))
    first = content(model)
    patch = wl.diff(base, parts(1), place / "p.safetensors")
    wl.apply(model, patch, exclude=[HEAD], in_place=True)
    assert loaded(model)[HEAD].equal(base[EMBED]) and loaded(model)[EMBED].equal(parts(1)[EMBED])
    wl.remove(model, patch)
    assert content(model) == first


def test_a_configuration_that_says_it_is_not_tied(place: Path) -> None:
    """Then equal bytes are chance, and the head stays."""
    base = parts(0)
    model = written(place / "model", twice(base), tie_word_embeddings=False)
    patch = wl.diff(base, parts(1), place / "p.safetensors")
    wl.apply(model, patch, in_place=True)
    assert loaded(model)[HEAD].equal(base[EMBED]) and loaded(model)[EMBED].equal(parts(1)[EMBED])


@pytest.mark.parametrize("command", ["remove", "remove all", "scale", "apply another"])
@pytest.mark.parametrize("before", [True, False])
def test_the_configuration_changes_while_it_is_on(place: Path, command: str, before: bool) -> None:
    """Whether the head follows is asked anew; whatever it was, no trace of the patch stays behind."""
    base = parts(0)
    model = written(place / "model", twice(base), tie_word_embeddings=before)
    first = (model / "model.safetensors").read_bytes()
    patch = wl.diff(base, parts(1), place / "p.safetensors")
    other = wl.diff(base, parts(2), place / "q.safetensors", encode="dense", include=["model.norm.weight"])
    wl.apply(model, patch, in_place=True)
    (model / "config.json").write_text(json.dumps({"tie_word_embeddings": not before}))
    if command == "scale":
        wl.scale(model, patch, 0.5)
    elif command == "apply another":
        wl.apply(model, other, in_place=True)
    if command in ("scale", "apply another"):
        clean = written(place / "clean", twice(base), tie_word_embeddings=not before)
        on = [patch.at(0.5)] if command == "scale" else [patch, other]
        wl.apply(clean, on, out=place / "new")
        expected = loaded(place / "new")
        assert all(t.equal(expected[n]) for n, t in loaded(model).items())
        assert wl.status(model).intact
    wl.remove(model, patch) if command == "remove" else wl.remove(model, everything=True)
    assert (model / "model.safetensors").read_bytes() == first
    assert not (model / ".weightlab").exists()


def test_a_head_that_the_patch_changes_in_another_way(place: Path) -> None:
    """A patch of an untied pair does not go on a model that stores the two once: both names are in the error."""
    base = parts(0)
    model = written(place / "model", base, tie_word_embeddings=True)
    before = content(place)
    loose = wl.diff(twice(base), parts(1) | {HEAD: parts(2)[EMBED]})
    with pytest.raises(WeightlabError) as caught:
        wl.apply(model, loose, in_place=True)
    assert caught.value.exit_code == 4 and any(HEAD in line for line in caught.value.offenders)
    assert content(place) == before


def test_a_patch_that_is_on_stays_one_patch(place: Path) -> None:
    """Taken of the pair that stores both or once, the change is the same; the two patches are not."""
    base, tuned = parts(0), parts(1)
    model = written(place / "model", twice(base))
    both = wl.diff(twice(base), twice(tuned), place / "p.safetensors", encode="dense:fp32")
    wl.apply(model, both, in_place=True)
    with pytest.raises(StackError):
        wl.apply(model, both.at(0.5), in_place=True)
    found = loaded(model)
    assert found[HEAD].equal(found[EMBED]) and found[EMBED].equal(tuned[EMBED])
