"""Models whose weights lie in several folders: sentence-transformers and diffusers, through every command."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import IntegrityError, MisfitError, NamesMismatchError, NotPatchableError, UsageError

transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")

IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 30]])


def dense(folder: Path, wide: int, narrow: int, activation: str, weights: str, state: dict[str, Tensor]) -> None:
    folder.mkdir()
    config = {"in_features": wide, "out_features": narrow, "bias": True, "activation_function": activation}
    (folder / "config.json").write_text(json.dumps(config))
    save(state, folder / weights)


def save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path, {"format": "pt"})


def sentence_model(folder: Path, seed: int, weights: str = "model.safetensors") -> Path:
    """BERT, mean pooling, two Dense layers, and a Normalize whose empty folder got lost."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 16, "pooling_mode_mean_tokens": true}')
    for place, wide, narrow, activation in (("2_Dense", 16, 8, "Tanh"), ("3_Dense", 8, 4, "ReLU")):
        state = {"linear.weight": torch.randn(narrow, wide), "linear.bias": torch.randn(narrow)}
        dense(folder / place, wide, narrow, f"torch.nn.modules.activation.{activation}", weights, state)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Dense", "Dense")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([*kinds, ("4_Normalize", "Normalize")])
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def encode(folder: Path) -> Tensor:
    """What the modules that modules.json lists make of two sentences, in their order."""
    value = torch.empty(0)
    for module in json.loads((folder / "modules.json").read_text()):
        place, kind = folder / module["path"], module["type"].rpartition(".")[2]
        if kind == "Transformer":
            bert = transformers.BertModel.from_pretrained(place, attn_implementation="eager").eval()
            value = bert(IDS).last_hidden_state.detach()
        elif kind == "Pooling":
            assert json.loads((place / "config.json").read_text())["pooling_mode_mean_tokens"]
            value = value.mean(1)
        elif kind == "Dense":
            config = json.loads((place / "config.json").read_text())
            linear = nn.Linear(config["in_features"], config["out_features"])
            path = place / "model.safetensors"  # as the library has it: safetensors first
            state = load_file(path) if path.is_file() else torch.load(place / "pytorch_model.bin", weights_only=True)
            linear.load_state_dict({n.removeprefix("linear."): t for n, t in state.items()})
            value = getattr(nn, config["activation_function"].rpartition(".")[2])()(linear(value)).detach()
        else:
            value = nn.functional.normalize(value, dim=1)
    return value


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return sentence_model(tmp_path / "base", 0), sentence_model(tmp_path / "tuned", 1)


def test_a_new_checkpoint_gives_the_tuned_outputs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base, tuned)
    names = {"linear.weight", "linear.bias"}
    assert {n for n in patch.records if "/" in n} == {f"{p}/{n}" for p in ("2_Dense", "3_Dense") for n in names}
    wl.apply(base, patch, out=tmp_path / "out")
    assert not torch.equal(encode(base), encode(tuned))
    assert torch.equal(encode(tmp_path / "out"), encode(tuned))
    assert hashes(tmp_path / "out").keys() == hashes(base).keys()
    assert set(load_file(tmp_path / "out/2_Dense/model.safetensors")) == names


@pytest.mark.parametrize("binary", ["base", "tuned", "both"])
def test_dense_layers_may_be_pickles(tmp_path: Path, binary: str) -> None:
    models = {}
    for seed, name in enumerate(("base", "tuned")):
        weights = "pytorch_model.bin" if binary in (name, "both") else "model.safetensors"
        models[name] = sentence_model(tmp_path / name, seed, weights)
    patch = wl.diff(models["base"], models["tuned"])
    done = wl.apply(models["base"], patch, out=tmp_path / "out")
    assert torch.equal(encode(tmp_path / "out"), encode(models["tuned"]))
    assert done.left_out == [] and (tmp_path / "out/3_Dense/model.safetensors").is_file()
    assert not list((tmp_path / "out").rglob("*.bin"))
    if binary != "tuned":
        with pytest.raises(NotPatchableError, match="pickles") as failed:
            wl.apply(models["base"], patch, in_place=True)
        assert failed.value.offenders == ("2_Dense/pytorch_model.bin", "3_Dense/pytorch_model.bin")


def test_in_place_and_off_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    clean = hashes(base)
    wl.diff(base, tuned, tmp_path / "p.safetensors")
    first = encode(base)
    wl.apply(base, tmp_path / "p.safetensors", in_place=True)
    assert torch.equal(encode(base), encode(tuned))
    assert (base / ".weightlab").is_dir() and not (base / "2_Dense/.weightlab").exists()
    assert wl.status(base).intact and wl.verify(base).clean is not None
    wl.apply(base, out=tmp_path / "copy")  # what is on goes along
    assert torch.equal(encode(tmp_path / "copy"), encode(tuned))
    wl.scale(base, tmp_path / "p.safetensors", 0.5)
    half = load_file(base / "2_Dense/model.safetensors")["linear.weight"]
    w = [load_file(m / "2_Dense/model.safetensors")["linear.weight"] for m in (tmp_path / "copy", tuned)]
    assert torch.equal(w[0], w[1]) and not torch.equal(half, w[1])
    wl.remove(base, tmp_path / "p.safetensors")
    assert hashes(base) == clean and torch.equal(encode(base), first)


def test_a_dense_layer_that_something_else_changed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    wl.diff(base, tuned, tmp_path / "p.safetensors")
    wl.apply(base, tmp_path / "p.safetensors", in_place=True)
    shutil.copy(base / "3_Dense/model.safetensors", tmp_path / "kept")
    save_file({"linear.weight": torch.ones(4, 8), "linear.bias": torch.ones(4)}, base / "3_Dense/model.safetensors")
    with pytest.raises(IntegrityError, match="changed") as failed:
        wl.verify(base)
    assert "3_Dense" in str(failed.value.offenders)
    shutil.copy(tmp_path / "kept", base / "3_Dense/model.safetensors")
    wl.remove(base, everything=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_patch_of_the_root_alone_fits(pair: tuple[Path, Path], tmp_path: Path, in_place: bool) -> None:
    base, tuned = pair
    patch = wl.diff(base / "model.safetensors", tuned / "model.safetensors", tmp_path / "p.safetensors")
    assert not any("/" in name for name in patch.records)
    out = base if in_place else tmp_path / "out"
    dense_before = load_file(base / "2_Dense/model.safetensors")
    wl.apply(base, patch, **({"in_place": True} if in_place else {"out": out}))  # type: ignore[call-overload]
    assert load_file(out / "model.safetensors").keys() == load_file(tuned / "model.safetensors").keys()
    assert all(
        torch.equal(t, load_file(out / "model.safetensors")[n])
        for n, t in load_file(tuned / "model.safetensors").items()
    )
    assert all(torch.equal(t, load_file(out / "2_Dense/model.safetensors")[n]) for n, t in dense_before.items())


def test_one_file_of_a_model_with_patches_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The root's own file is read without what is on it; a part, which the record is not about by name, is refused."""
    base, tuned = pair
    clean = wl.verify(base / "model.safetensors").identity
    wl.diff(base, tuned, tmp_path / "p.safetensors")
    wl.apply(base, tmp_path / "p.safetensors", in_place=True)
    assert wl.verify(base / "model.safetensors").clean == clean
    with pytest.raises(IntegrityError, match="another name"):
        wl.verify(base / "2_Dense")


def test_a_part_by_itself_is_not_changed_in_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    patch = wl.diff(base / "2_Dense", tuned / "2_Dense", tmp_path / "p.safetensors")
    assert set(patch.records) == {"linear.weight", "linear.bias"}
    for path in (base / "2_Dense", base / "2_Dense/model.safetensors"):
        with pytest.raises(NotPatchableError, match="one part of a larger model") as failed:
            wl.apply(path, patch, in_place=True)
        assert str(base) in failed.value.remedy
    assert not list(base.rglob(".weightlab"))


def test_patches_that_are_on_come_off_also_when_a_part_became_a_pickle(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    before = hashes(base)["model.safetensors"]
    patch = wl.diff(base, tuned, tmp_path / "p.safetensors", include="encoder.*")
    wl.apply(base, patch, in_place=True)
    dense = load_file(base / "2_Dense/model.safetensors")
    (base / "2_Dense/model.safetensors").unlink()
    torch.save(dense, base / "2_Dense/pytorch_model.bin")
    assert [on.name for on in wl.status(base).patches] == ["p.safetensors"] and wl.status(base).intact
    with pytest.raises(NotPatchableError, match="patches are on its parts"):
        wl.apply(base, out=tmp_path / "out")
    wl.remove(base, everything=True)
    assert hashes(base)["model.safetensors"] == before and wl.status(base).patches == []
    wl.apply(base, out=tmp_path / "out")


def test_inspected_compared_and_merged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    rows = {row.name: row.shape for row in wl.inspect(base).tensors}
    assert rows["2_Dense/linear.weight"] == [8, 16] and rows["3_Dense/linear.bias"] == [4]
    shutil.copy(base / "model.safetensors", tuned / "model.safetensors")
    assert set(wl.diff(base, tuned).records) == {n for n in rows if "/" in n}
    wl.merge(base, [tuned], tmp_path / "merged")
    assert torch.allclose(encode(tmp_path / "merged"), encode(tuned), atol=1e-5)
    shutil.copytree(base, tmp_path / "target")
    wl.transfer(base, tuned, tmp_path / "target", tmp_path / "moved", rows="by-id")
    assert torch.allclose(encode(tmp_path / "moved"), encode(tuned), atol=1e-5)


def test_a_part_that_only_one_of_two_has(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    shutil.rmtree(tuned / "3_Dense")
    with pytest.raises(NamesMismatchError) as failed:
        wl.diff(base, tuned)
    assert [line.partition(" ")[0] for line in failed.value.offenders] == [
        "3_Dense/linear.bias",
        "3_Dense/linear.weight",
    ]
    with pytest.raises(UsageError, match="several files"):
        wl.apply(base, out=tmp_path / "one.safetensors")


def test_tensors_that_a_patch_adds_go_to_their_part(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    state = load_file(tuned / "2_Dense/model.safetensors") | {"scale": torch.ones(3)}
    save_file(state, tuned / "2_Dense/model.safetensors")
    patch = wl.diff(base, tuned, allow=["added"])
    wl.apply(base, patch, out=tmp_path / "out")
    got = load_file(tmp_path / "out/2_Dense/model.safetensors")
    assert got.keys() == state.keys() and all(torch.equal(got[n], state[n]) for n in state)
    shutil.rmtree(base / "2_Dense")  # a part that the base lacks is not put into another's file
    patch = wl.diff(base, tuned, allow=["added"])
    with pytest.raises(MisfitError, match="parts that the model does not have") as failed:
        wl.apply(base, patch, out=tmp_path / "more")
    assert len(failed.value.offenders) == 3 and not (tmp_path / "more").exists()


def test_the_codes_of_a_part_are_told_by_its_own_configuration(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    for model in pair:
        config = json.loads((model / "2_Dense/config.json").read_text())
        (model / "2_Dense/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    patch = wl.diff(base, tuned)  # exact
    with pytest.raises(MisfitError) as failed:
        wl.apply(base, 0.5 * patch, out=tmp_path / "out")
    assert all("2_Dense/" in line for line in failed.value.offenders) and failed.value.offenders


# Pipelines


UNET = {"down_blocks.0.weight": (6, 4), "mid.weight": (4, 4)}
TEXT = {"text_model.embed.weight": (9, 4), "text_model.layers.0.weight": (4, 4)}


def tensors(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pipeline(folder: Path, seed: int, text_encoder: str = "model.safetensors") -> Path:
    """A sharded unet, a text encoder, a vae with a variant, folders without weights, a single file beside."""
    for name in ("unet", "text_encoder", "vae", "scheduler", "tokenizer"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}_config.json").write_text("{}")
    unet = tensors(UNET, seed)
    shards = {n: f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i, n in enumerate(UNET, 1)}
    for name, file in shards.items():
        save_file({name: unet[name]}, folder / "unet" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 160}, "weight_map": shards}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save(tensors(TEXT, seed + 100), folder / "text_encoder" / text_encoder)
    vae = tensors({"encoder.weight": (3, 3)}, seed + 200)
    save_file(vae, folder / "vae/diffusion_pytorch_model.safetensors")
    save_file({n: t.half() for n, t in vae.items()}, folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    save_file({"model.diffusion_model.x": torch.ones(2)}, folder / "v1-5-pruned.safetensors")
    listed: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(listed))
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": tensor
        for part in ("unet", "text_encoder", "vae")
        for path in sorted((folder / part).glob("*.safetensors"))
        if "fp16" not in path.name
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("text_encoder", ["model.safetensors", "pytorch_model.bin"])
def test_a_pipeline_written_anew(tmp_path: Path, text_encoder: str) -> None:
    base, tuned = pipeline(tmp_path / "base", 0, text_encoder), pipeline(tmp_path / "tuned", 1, text_encoder)
    patch = wl.diff(base, tuned)
    right = {f"unet/{n}": t for n, t in tensors(UNET, 1).items()}
    right |= {f"text_encoder/{n}": t for n, t in tensors(TEXT, 101).items()}
    right |= {f"vae/{n}": t for n, t in tensors({"encoder.weight": (3, 3)}, 201).items()}
    assert set(patch.records) == set(right)
    done = wl.apply(base, patch, out=tmp_path / "out")
    got = weights_of(tmp_path / "out")
    assert got.keys() == right.keys() and all(torch.equal(got[n], right[n]) for n in right)
    assert sorted(done.left_out) == ["v1-5-pruned.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index == json.loads((base / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert (tmp_path / "out/model_index.json").read_bytes() == (base / "model_index.json").read_bytes()
    assert (tmp_path / "out/scheduler/scheduler_config.json").is_file()


def test_a_pipeline_in_place(tmp_path: Path) -> None:
    base, tuned = pipeline(tmp_path / "base", 0), pipeline(tmp_path / "tuned", 1)
    clean, right = hashes(base), weights_of(tuned)
    wl.diff(base, tuned, tmp_path / "p.safetensors")
    done = wl.apply(base, tmp_path / "p.safetensors", in_place=True)
    got = weights_of(base)
    assert all(torch.equal(got[n], right[n]) for n in right)
    stale = [note for note in done.notes if note.startswith("not changed")]
    assert len(stale) == 2 and "vae/diffusion_pytorch_model.fp16.safetensors" in stale[1]
    assert wl.status(base).intact and [p.name for p in wl.status(base).patches] == ["p.safetensors"]
    wl.remove(base, everything=True)
    assert hashes(base) == clean


def test_two_encoders_with_equal_tables_are_not_tied(tmp_path: Path) -> None:
    """Tensors of two parts may be equal by chance, or because both began as one model; they are two all the same."""
    base = pipeline(tmp_path / "base", 0)
    shutil.copytree(base / "text_encoder", base / "text_encoder_2")
    listed = json.loads((base / "model_index.json").read_text())
    listed["text_encoder_2"] = listed["text_encoder"]
    (base / "model_index.json").write_text(json.dumps(listed))
    shutil.copytree(base, tmp_path / "tuned")
    table = tensors(TEXT, 100)
    save_file({n: t + 1 for n, t in table.items()}, tmp_path / "tuned/text_encoder/model.safetensors")
    patch = wl.diff(base, tmp_path / "tuned", encode="dense", include="text_encoder/*")
    wl.apply(base, patch, out=tmp_path / "out")
    assert all(
        torch.equal(t, table[n]) for n, t in load_file(tmp_path / "out/text_encoder_2/model.safetensors").items()
    )
    shutil.rmtree(tmp_path / "tuned/text_encoder_2")
    with pytest.raises(NamesMismatchError) as failed:  # nor is one that is missing a copy that may be missing
        wl.diff(base, tmp_path / "tuned")
    assert [line.partition(" ")[0] for line in failed.value.offenders] == [f"text_encoder_2/{name}" for name in TEXT]
    changed = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert all(torch.allclose(changed[n], table[n] + 1) for n in table)


def test_a_part_that_is_missing_is_not_taken_for_a_tied_one(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", 0)
    shutil.copytree(base / "text_encoder", base / "text_encoder_2")
    listed = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**listed, "text_encoder_2": listed["text_encoder"]}))
    shutil.copytree(base, tmp_path / "tuned")
    for name in ("text_encoder", "text_encoder_2"):  # both change alike
        save_file(tensors(TEXT, 7), tmp_path / "tuned" / name / "model.safetensors")
    patch = wl.diff(base, tmp_path / "tuned")
    shutil.rmtree(base / "text_encoder_2")
    with pytest.raises(NamesMismatchError) as failed:
        wl.apply(base, patch, out=tmp_path / "out")
    assert len(failed.value.offenders) == 2 and all("text_encoder_2/" in line for line in failed.value.offenders)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_tied_in_a_part_its_own_configuration_says(tmp_path: Path, tied: bool) -> None:
    """One table stored twice in a part, of which a patch names one."""
    base = pipeline(tmp_path / "base", 0)
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    state = {"shared.weight": table, "lm_head.weight": table.clone()}
    save_file(state, base / "text_encoder/model.safetensors")
    (base / "text_encoder/config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": not tied}))
    tuned = {f"text_encoder/{name}": tensor for name, tensor in state.items()}
    tuned["text_encoder/shared.weight"] = table + 1
    before = {f"text_encoder/{name}": tensor for name, tensor in state.items()}
    patch = wl.diff(before, tuned, include="*/shared.weight", encode="dense")
    wl.apply(base, patch, out=tmp_path / "out")
    got = load_file(tmp_path / "out/text_encoder/model.safetensors")
    assert torch.allclose(got["shared.weight"], table + 1)
    assert torch.equal(got["lm_head.weight"], got["shared.weight"] if tied else table)
