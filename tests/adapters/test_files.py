"""The files of an adapter's folder as people have them: names in keys, shards, pickles, companions, empty ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MalformedFileError, MissingInputError, NamesMismatchError, UnsupportedFormatError

A, B = torch.arange(12.0).reshape(2, 6) / 10, torch.arange(8.0).reshape(4, 2) / 10
FACTORS = {"layer.lora_A.weight": A, "layer.lora_B.weight": B}
PREFIX = "base_model.model."


def configured(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def adapter(folder: Path, tensors: dict[str, Tensor], prefix: str = PREFIX, **config: Any) -> Path:
    configured(folder, **config)
    save_file({f"{prefix}{n}": t.clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def base() -> dict[str, Tensor]:
    return {"layer.weight": torch.ones(4, 6), "layer.bias": torch.ones(4), "norm.weight": torch.ones(3)}


def is_right(folder: Path) -> None:
    found = wl.apply(base(), folder)
    assert torch.allclose(found["layer.weight"], 1 + 2 * (B @ A), rtol=0, atol=1e-6)
    assert all(torch.equal(found[name], tensor) for name, tensor in base().items() if name != "layer.weight")


KEYS = {
    "plain": {},
    "the usual name": {"layer.lora_A.default.weight": A, "layer.lora_B.default.weight": B},
    "a name of its own": {"layer.lora_A.my_adapter.weight": A, "layer.lora_B.my_adapter.weight": B},
    "compiled": {"_orig_mod.layer.lora_A.weight": A, "_orig_mod.layer.lora_B.weight": B},
    "compiled inside": {"layer._orig_mod.lora_A.weight": A, "layer._orig_mod.lora_B.weight": B},
    "deepspeed": {"module.layer.lora_A.weight": A, "module.layer.lora_B.weight": B},
    "fsdp": {
        "_fsdp_wrapped_module.layer.lora_A.default.weight": A,
        "_fsdp_wrapped_module.layer.lora_B.default.weight": B,
    },
    "twice in peft": {f"{PREFIX}layer.lora_A.weight": A, f"{PREFIX}layer.lora_B.weight": B},
}


@pytest.mark.parametrize("kind", KEYS)
def test_what_stands_around_names_is_taken_off(tmp_path: Path, kind: str) -> None:
    is_right(adapter(tmp_path / "a", KEYS[kind] or FACTORS))


def test_keys_without_prefix(tmp_path: Path) -> None:
    is_right(adapter(tmp_path / "a", FACTORS, prefix=""))


def test_a_module_that_is_called_module(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", {**FACTORS, "module.weight": torch.full((3,), 7.0)})
    found = wl.apply(base() | {"module.weight": torch.zeros(3)}, folder)
    assert torch.equal(found["module.weight"], torch.full((3,), 7.0))


def test_saved_modules_with_the_adapters_name(tmp_path: Path) -> None:
    saved = {"norm.modules_to_save.default.weight": torch.full((3,), 2.0), "norm.original_module.weight": torch.ones(3)}
    found = wl.apply(base(), adapter(tmp_path / "a", {**FACTORS, **saved}))
    assert torch.equal(found["norm.weight"], torch.full((3,), 2.0))


def test_modules_that_peft_saves_twice(tmp_path: Path) -> None:
    saved = {"norm.modules_to_save.weight": torch.full((3,), 2.0), "norm.weight": torch.full((3,), 2.0)}
    found = wl.apply(base(), adapter(tmp_path / "a", {**FACTORS, **saved}))
    assert torch.equal(found["norm.weight"], torch.full((3,), 2.0))
    other = adapter(tmp_path / "b", {**FACTORS, **saved, "norm.weight": torch.full((3,), 3.0)})
    with pytest.raises(MalformedFileError, match="twice") as caught:
        wl.apply(base(), other)
    assert len(caught.value.offenders) == 1


def test_saved_modules_of_several_layers(tmp_path: Path) -> None:
    model = base() | {"head.dense.weight": torch.zeros(2, 2), "head.out.weight": torch.zeros(1, 2)}
    saved = {
        "head.modules_to_save.ours.dense.weight": torch.ones(2, 2),
        "head.modules_to_save.ours.out.weight": torch.ones(1, 2),
    }
    found = wl.apply(model, adapter(tmp_path / "a", {**FACTORS, **saved}))
    assert bool((found["head.dense.weight"] == 1).all()) and bool((found["head.out.weight"] == 1).all())


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {f"layer.lora_{k}.{name}.weight": t for k, t in (("A", A), ("B", B)) for name in ("one", "two")}
    with pytest.raises(UnsupportedFormatError, match="2 adapters") as caught:
        wl.apply(base(), adapter(tmp_path / "a", tensors))
    assert caught.value.offenders == ("one", "two")


def test_a_configuration_of_2023(tmp_path: Path) -> None:
    old = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["layer"],
        "task_type": "CAUSAL_LM",
    }
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(old))
    torch.save({f"{PREFIX}{name}": tensor for name, tensor in FACTORS.items()}, folder / "adapter_model.bin")
    is_right(folder)


def test_shards(tmp_path: Path) -> None:
    folder = configured(tmp_path / "a")
    places = {}
    for number, (name, tensor) in enumerate(FACTORS.items(), 1):
        shard = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file({f"{PREFIX}{name}": tensor}, folder / shard)
        places[f"{PREFIX}{name}"] = shard
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    is_right(folder)
    (folder / shard).rename(tmp_path / shard)
    with pytest.raises(MissingInputError, match="shards are missing") as caught:
        wl.apply(base(), folder)
    assert caught.value.offenders == (shard,)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, f"../{shard}")}))
    with pytest.raises(MalformedFileError, match="plain names"):
        wl.apply(base(), folder)


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin"])
def test_companions_with_trained_values_are_read(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", FACTORS)
    torch.save({f"{PREFIX}norm.weight": torch.full((3,), 5.0)}, folder / name)
    torch.save({"epoch": torch.ones(1)}, folder / "optimizer.pt")
    found = wl.apply(base(), folder)
    assert torch.equal(found["norm.weight"], torch.full((3,), 5.0))
    torch.save({f"{PREFIX}gone.weight": torch.ones(3)}, folder / name)
    with pytest.raises(NamesMismatchError, match=r"gone\.weight"):
        wl.apply(base(), folder)


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "something.safetensors", "projector_of_ours.pt"])
def test_other_weights_beside_it_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", FACTORS)
    save_file({"input_embeddings": torch.ones(2, 3)}, folder / name)
    with pytest.raises(UnsupportedFormatError, match="would be lost") as caught:
        wl.apply(base(), folder)
    assert caught.value.offenders[0].startswith(f"{name}: ")


EMPTY: dict[str, dict[str, Tensor]] = {
    "no tensors": {},
    "factors": {"layer.lora_A.weight": torch.zeros(0), "layer.lora_B.weight": torch.zeros(0)},
    "saved": {**FACTORS, "norm.weight": torch.zeros(0)},
    "rank 0": {"layer.lora_A.weight": torch.zeros(0, 6), "layer.lora_B.weight": torch.zeros(4, 0)},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_what_zero_3_emptied_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(MalformedFileError, match=r"no tensors|no elements") as caught:
        wl.apply(base(), adapter(tmp_path / "a", EMPTY[kind]))
    assert "ZeRO-3" in caught.value.remedy


def test_values_that_the_model_has_change_nothing(tmp_path: Path) -> None:
    model = tmp_path / "base.safetensors"
    save_file(base(), model)
    folder = adapter(tmp_path / "a", {"norm.weight": torch.ones(3)})
    done = wl.apply(model, folder, out=tmp_path / "out.safetensors")
    assert any("changes nothing" in note for note in done.notes)
    assert (tmp_path / "out.safetensors").read_bytes() == model.read_bytes()


def test_a_key_without_end(tmp_path: Path) -> None:
    name = "a." + "lora_" * 20_000
    with pytest.raises(MalformedFileError, match="such a name"):
        wl.apply(base(), adapter(tmp_path / "a", {**FACTORS, name: torch.ones(3)}))


def notes(folder: Path, model: Path, out: Path) -> list[str]:
    return wl.apply(model, folder, out=out).notes


def test_what_changes_nothing_and_what_was_trained_elsewhere_is_told(tmp_path: Path) -> None:
    model = tmp_path / "base"
    model.mkdir()
    save_file(base(), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"_name_or_path": "someone/Llama-9"}))
    zero = adapter(tmp_path / "zero", {**FACTORS, "layer.lora_B.weight": torch.zeros(4, 2)})
    assert any("changes nothing" in note for note in notes(zero, model, tmp_path / "one"))
    nothing = {"layer.lora_A.weight": A, "layer.lora_B.weight": B * 0, "layer.lora_B.bias": torch.zeros(4)}
    assert any("changes nothing" in n for n in notes(adapter(tmp_path / "bias", nothing), model, tmp_path / "four"))
    ours = adapter(tmp_path / "ours", FACTORS, base_model_name_or_path="other/llama-9")
    assert not notes(ours, model, tmp_path / "two")
    theirs = adapter(tmp_path / "theirs", FACTORS, base_model_name_or_path="other/Mistral-7")
    assert any("trained on other/Mistral-7" in note for note in notes(theirs, model, tmp_path / "three"))


SHAPES: dict[str, dict[str, Tensor]] = {
    "a vector": {"layer.lora_A.weight": torch.zeros(32), "layer.lora_B.weight": B},
    "0-d": {"layer.lora_A.weight": torch.zeros(()), "layer.lora_B.weight": torch.zeros(())},
    "ranks differ": {"layer.lora_A.weight": A, "layer.lora_B.weight": torch.zeros(4, 3)},
    "B of a convolution that is wider than one": {"layer.lora_A.weight": A, "layer.lora_B.weight": torch.ones(4, 2, 3)},
    "a bias of A": {**FACTORS, "layer.lora_A.bias": torch.ones(2)},
    "factors of two kinds": {**FACTORS, "layer.lora_embedding_A": A, "layer.lora_embedding_B": B},
    "half": {"layer.lora_A.weight": A},
    "half an embedding": {"layer.lora_embedding_B": A},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_factors_that_make_no_sense_are_all_listed(tmp_path: Path, kind: str) -> None:
    tensors = SHAPES[kind] | {name.replace("layer", "other"): tensor for name, tensor in SHAPES[kind].items()}
    with pytest.raises(MalformedFileError, match="make no sense") as caught:
        wl.apply(base(), adapter(tmp_path / "a", tensors))
    assert [line.partition(":")[0] for line in caught.value.offenders] == ["layer", "other"]


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha_pattern": {"alpha_pattern": {"(": 3, "[": 1, "fine": 2}},
    "alpha_pattern.layer": {"alpha_pattern": {"layer": "4"}},
    "target_parameters.0": {"target_parameters": [3]},
    "lora_alpha": {"lora_alpha": 10**400},
    "use_dora": {"use_dora": 2},
    "trainable_token_indices": {"trainable_token_indices": [-1]},
    "more parameters than target_parameters": {"target_parameters": ["layer"]},
    "peft_type": {"peft_type": ["LORA"]},
    "r: ": {"r": 0},
}


@pytest.mark.parametrize("words", CONFIGS)
def test_configurations_that_make_no_sense(tmp_path: Path, words: str) -> None:
    tensors = {f"layer.base_layer.{n.removeprefix('layer.')}": t for n, t in FACTORS.items()}
    with pytest.raises(MalformedFileError) as caught:
        wl.apply(base(), adapter(tmp_path / "a", {**FACTORS, **tensors}, **CONFIGS[words]))
    assert words in str(caught.value), caught.value


@pytest.mark.parametrize("text", ["[" * 100000, "[]", "null", '{"peft_type": "LORA", "peft_type": "LORA"}', "\x80"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    folder = adapter(tmp_path / "a", FACTORS)
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedFileError, match=r"adapter_config\.json"):
        wl.apply(base(), folder)


OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "enable_lora": [True, False, True],
    "layer_replication": [[0, 4]],
    "megatron_config": {"x": 1},
    "use_qalora": True,
    "some_day": 1,
}


def test_dora_on_a_parameter_is_not_ignored(tmp_path: Path) -> None:
    tensors = {**FACTORS, "layer.lora_magnitude_vector.weight": torch.ones(4)}
    with pytest.raises(MalformedFileError, match="lora_magnitude_vector on a parameter"):
        wl.apply(base(), adapter(tmp_path / "a", tensors, target_parameters=["layer.weight"]))


@pytest.mark.parametrize("name", ["a" * 3000 + "/b", "a/\0", "../../x", ""])
def test_odd_names_of_the_base_are_only_names(tmp_path: Path, name: str) -> None:
    is_right(adapter(tmp_path / "a", FACTORS, base_model_name_or_path=name))


def test_options_that_are_not_computed_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="cannot be computed") as caught:
        wl.apply(base(), adapter(tmp_path / "a", FACTORS, **OPTIONS))
    assert {line.split(" ")[0].rstrip(":") for line in caught.value.offenders} == set(OPTIONS)


@pytest.mark.parametrize("started", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_what_was_trained_on_changed_weights_is_refused(tmp_path: Path, started: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=started) as caught:
        wl.apply(base(), adapter(tmp_path / "a", FACTORS, init_lora_weights=started))
    assert "path_initial_model_for_weight_conversion" in caught.value.remedy


@pytest.mark.parametrize("started", [True, False, "gaussian", "eva", "orthogonal", None])
def test_how_else_it_was_started_does_not_matter(tmp_path: Path, started: Any) -> None:
    is_right(adapter(tmp_path / "a", FACTORS, init_lora_weights=started))


def test_a_rank_that_is_not_the_configuration_s_is_refused(tmp_path: Path) -> None:
    """alpha is divided by the rank: of the file or of the configuration would be two different models."""
    with pytest.raises(MalformedFileError, match="make no sense") as caught:
        wl.apply(base(), adapter(tmp_path / "a", FACTORS, r=8, rank_pattern={"layer": 3}))
    assert caught.value.offenders == ("layer: rank 2 in the file, 3 in adapter_config.json",)
    wl.apply(base(), adapter(tmp_path / "b", FACTORS, r=8, rank_pattern={"layer": 2}))
