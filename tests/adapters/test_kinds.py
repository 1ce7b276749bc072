"""Every kind of adapter that peft knows: those that fold are what `merge_and_unload` gives, the others are refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.adapters.kinds import NOT_FOLDED, OWN, THROUGH_PEFT
from weightlab.errors import MalformedFileError, MisfitError, UnsupportedFormatError, UsageError

transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")
peft = pytest.importorskip("peft", reason="peft is an extra")

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True}
Make = Callable[[], nn.Module]


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=False))


def deep_llama() -> nn.Module:
    """More than ten layers, so that the order of names is not that of the layers."""
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 12}, **HEADS, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


# Most of them go on one square and one oblong module.
LINEAR = {"target_modules": ["q_proj", "down_proj"]}
CONVOLUTION = {"target_modules": ["convolution"]}
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
PATTERN = {"rank_pattern": {"down_proj": 2}}
KINDS: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "adalora": ("ADALORA", llama, {**LINEAR, "total_step": 10, "init_r": 4, "target_r": 2}),
    "adalora, convolution": ("ADALORA", resnet, {**CONVOLUTION, "total_step": 10, "init_r": 4}),
    "adamss": ("ADAMSS", llama, {**LINEAR, "r": 4, "num_subspaces": 2, "subspace_rank": 2}),
    "beft": ("BEFT", llama, {"target_modules": ["q_proj"]}),
    "boft": ("BOFT", llama, {**LINEAR, "boft_block_size": 4}),
    "boft, convolution": ("BOFT", resnet, {**CONVOLUTION, "boft_block_size": 1, "boft_n_butterfly_factor": 0}),
    "c3a": ("C3A", llama, {**LINEAR, "block_size": 4}),
    "deft": ("DEFT", llama, LINEAR),
    "delora": ("DELORA", llama, LINEAR),
    "delora, patterns": ("DELORA", llama, {**LINEAR, **PATTERN, "lambda_pattern": {"q_proj": 3}}),
    "fourierft": ("FOURIERFT", llama, {**LINEAR, "n_frequency": 20}),
    "fourierft, pattern": ("FOURIERFT", llama, {**LINEAR, "n_frequency_pattern": {"q_proj": 10}, "n_frequency": 20}),
    "fourierft, Conv1D": ("FOURIERFT", gpt2, {"target_modules": ["c_attn"], "n_frequency": 20}),
    "frod": ("FROD", llama, LINEAR),
    "glora": ("GLORA", llama, LINEAR),
    "gralora": ("GRALORA", llama, {**LINEAR, "r": 4}),
    "hira": ("HIRA", llama, LINEAR),
    "hira, embedding": ("HIRA", llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "hira, convolution": ("HIRA", resnet, CONVOLUTION),
    "hra": ("HRA", llama, {**LINEAR, "r": 4}),
    "hra, convolution": ("HRA", resnet, {**CONVOLUTION, "r": 2}),
    "ia3": ("IA3", llama, {**LINEAR, "feedforward_modules": ["down_proj"]}),
    "ia3, Conv1D": ("IA3", gpt2, {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"]}),
    "ia3, convolution": ("IA3", resnet, {**CONVOLUTION, "feedforward_modules": []}),
    "ln_tuning": ("LN_TUNING", llama, {"target_modules": ["input_layernorm", "norm"]}),
    "ln_tuning with biases": ("LN_TUNING", gpt2, {"target_modules": ["ln_1"]}),
    "loha": ("LOHA", llama, {**LINEAR, **PATTERN, "r": 4, "alpha_pattern": {"layers.1.*q_proj": 3}}),
    "loha, convolution": ("LOHA", resnet, {**CONVOLUTION, "r": 4, "use_effective_conv2d": True}),
    "lokr": ("LOKR", llama, {**LINEAR, **PATTERN, "r": 4, "decompose_both": True}),
    "lokr, convolution": ("LOKR", resnet, {**CONVOLUTION, "r": 4}),
    "miss": ("MISS", llama, {**LINEAR, "r": 4}),
    "miss, bat": ("MISS", llama, {"target_modules": ["q_proj"], "r": 4, "init_weights": "bat"}),
    "miss, mini": ("MISS", llama, {**LINEAR, "r": 4, "mini_r": 2, "init_weights": "mini"}),
    "oft": ("OFT", llama, {**LINEAR, "oft_block_size": 4}),
    "oft, convolution": ("OFT", resnet, {**CONVOLUTION, "oft_block_size": 0, "r": 1}),
    "oft, embedding": ("OFT", llama, {"target_modules": ["embed_tokens"], "oft_block_size": 4}),
    "osf": ("OSF", llama, {**LINEAR, "effective_rank": 4}),
    "peanut": ("PEANUT", llama, LINEAR),
    "psoft": ("PSOFT", llama, {**LINEAR, "r": 4}),
    "pvera": ("PVERA", llama, {**LINEAR, "r": 8}),
    "randlora": ("RANDLORA", llama, LINEAR),
    "randlora, projections not saved": ("RANDLORA", llama, {**LINEAR, "save_projection": False}),
    "randlora, Conv1D": ("RANDLORA", gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    "road": ("ROAD", llama, {**LINEAR, "group_size": 4}),
    "shira": ("SHIRA", llama, {**LINEAR, "r": 2}),
    "supertuning": ("SUPERTUNING", llama, LINEAR),
    "tinylora": ("TINYLORA", llama, {**LINEAR, "r": 2, "u": 3}),
    "tinylora, tied": ("TINYLORA", deep_llama, {**LINEAR, "r": 2, "u": 3, "weight_tying": 0.5}),
    "tinylora, embedding": ("TINYLORA", llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "u": 3}),
    "trainable_tokens": ("TRAINABLE_TOKENS", llama, {"token_indices": [1, 5], "target_modules": ["embed_tokens"]}),
    "unilora": ("UNILORA", deep_llama, {**LINEAR, "r": 2, "theta_d_length": 64}),
    "unilora, indices saved": ("UNILORA", llama, {**LINEAR, "r": 2, "theta_d_length": 64, "save_indices": True}),
    "vblora": ("VBLORA", llama, {**LINEAR, "num_vectors": 10, "vector_length": 4, "topk": 2}),
    "vblora, topk only": (
        "VBLORA",
        llama,
        {**LINEAR, "num_vectors": 10, "vector_length": 4, "topk": 2, "save_only_topk_weights": True},
    ),
    "vera": ("VERA", llama, {**LINEAR, "r": 8}),
    "vera, projections not saved": ("VERA", llama, {**LINEAR, "r": 8, "save_projection": False}),
    "vera, Conv1D": ("VERA", gpt2, {"target_modules": ["c_attn", "attn.c_proj"], "r": 8}),
    "waveft": ("WAVEFT", llama, {**LINEAR, "n_frequency": 20}),
    "lora, bdlora": ("LORA", llama, {**LINEAR, "r": 4, "use_bdlora": BLOCKS}),
    "lora, monteclora": ("LORA", llama, {**LINEAR, "monteclora_config": "MontecloraConfig"}),
    "lora, velora": ("LORA", llama, {**LINEAR, "velora_config": "VeloraConfig"}),
    "lora, kasa": ("LORA", llama, {**LINEAR, "kasa_config": "KasaConfig"}),
    "lora, mica": ("LORA", llama, {**LINEAR, "init_lora_weights": "mica"}),
    "lora with other things": (
        "LOHA",
        llama,
        {**LINEAR, "r": 4, "modules_to_save": ["lm_head"], "layers_to_transform": [1]},
    ),
}


def made(folder: Path, kind: str) -> tuple[Path, Path, dict[str, Tensor]]:
    """(base, adapter, the tensors that peft's merge is saved with)."""
    name, make, options = KINDS[kind]
    torch.manual_seed(0)
    options = {k: getattr(peft, v)() if str(v).endswith("Config") else v for k, v in options.items()}
    if "use_bdlora" in options:
        options["use_bdlora"] = peft.tuners.lora.BdLoraConfig(**options["use_bdlora"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make()
        network.save_pretrained(folder / "base")
        configuration = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name](**options)
        model = peft.get_peft_model(network, configuration)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / "adapter")
        kind_of: Any = type(network)
        fresh = kind_of.from_pretrained(folder / "base")
        merged = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", load_file(folder / "merged" / "model.safetensors")


def test_every_kind_is_decided_on() -> None:
    """A kind that a new version of peft brings fails here: it is computed, or refused with the reason."""
    known = set(OWN) | set(THROUGH_PEFT) | set(NOT_FOLDED)
    assert {kind.value for kind in peft.PeftType} <= known
    assert not (set(OWN) | set(THROUGH_PEFT)) & set(NOT_FOLDED)
    assert set(THROUGH_PEFT) | set(OWN) == {kind for kind, *_ in KINDS.values()} | {"LORA"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    base, adapter, merged = made(tmp_path, kind)
    clean = load_file(base / "model.safetensors")
    wl.apply(base, adapter, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == merged.keys() == clean.keys()
    for name, tensor in merged.items():
        furthest = float((found[name] - tensor).abs().max())
        assert furthest <= 1e-6 * float(tensor.abs().max()), (name, furthest)
    assert {n for n, t in merged.items() if not torch.allclose(t, clean[n], rtol=0, atol=1e-5)}


@pytest.mark.parametrize("kind", sorted(NOT_FOLDED))
def test_what_does_not_fold_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    save_file({"layer.weight": torch.randn(4, 6)}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"prompt_embeddings": torch.randn(4, 6)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedFormatError, match=kind) as caught:
        wl.apply(tmp_path / "base.safetensors", tmp_path / "adapter", out=tmp_path / "out.safetensors")
    assert NOT_FOLDED[kind] in str(caught.value) and "PeftModel" in caught.value.remedy
    assert not (tmp_path / "out.safetensors").exists()


def test_ranks_that_adalora_has_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = llama()
        network.save_pretrained(tmp_path / "base")
        model = peft.get_peft_model(network, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
        kept = {f"model.layers.{i}.self_attn.q_proj.lora_E.default": [True, False, i == 0, False] for i in range(2)}
        model.peft_config["default"].rank_pattern = kept
        model.save_pretrained(tmp_path / "adapter")
        fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    ].shape == (2, 16)
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[n], merged[n], rtol=0, atol=1e-6 * float(merged[n].abs().max())) for n in found)


@pytest.mark.parametrize("kind", ["adalora", "loha", "loha, convolution", "ia3", "boft", "shira", "osf", "hra"])
def test_without_the_network_shapes_tell(tmp_path: Path, kind: str) -> None:
    base, adapter, merged = made(tmp_path, kind)
    wl.apply(base / "model.safetensors", adapter, out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.allclose(found[n], t, rtol=0, atol=1e-6 * float(t.abs().max())) for n, t in merged.items())


@pytest.mark.parametrize("kind", ["vera", "tinylora", "unilora"])
def test_modules_that_share_need_the_network(tmp_path: Path, kind: str) -> None:
    base, adapter, _ = made(tmp_path, kind)
    with pytest.raises(UsageError, match=r"config\.json"):
        wl.apply(base / "model.safetensors", adapter, out=tmp_path / "out.safetensors")


def test_without_peft_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = made(tmp_path, "loha")
    monkeypatch.setattr("weightlab.adapters.peft_layers.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="LOHA") as caught:
        wl.apply(base, adapter, out=tmp_path / "out")
    assert caught.value.remedy == "pip install 'weightlab[peft]'"


def test_in_place_in_memory_and_at_a_scale(tmp_path: Path) -> None:
    base, adapter, merged = made(tmp_path, "loha")
    clean = {n: t.clone() for n, t in load_file(base / "model.safetensors").items()}
    first = (base / "model.safetensors").read_bytes()
    wl.apply(base, f"{adapter}@0.5", in_place=True)
    name = "model.layers.0.mlp.down_proj.weight"
    half = load_file(base / "model.safetensors")[name]
    assert torch.allclose(half, (clean[name] + merged[name]) / 2, atol=1e-6)
    wl.remove(base, adapter)
    assert (base / "model.safetensors").read_bytes() == first
    network = transformers.LlamaForCausalLM.from_pretrained(base)
    with wl.patched(network, adapter):
        assert torch.allclose(network.state_dict()[name], merged[name], atol=1e-6)
    assert torch.equal(network.state_dict()[name], clean[name])


def test_tensors_that_are_missing_unknown_or_of_another_shape(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, "loha")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.down_proj.hada_w1_a"
    save_file({n: t for n, t in tensors.items() if n != key} | {f"{key}x": tensors[key].clone()}, file)
    with pytest.raises(MalformedFileError, match="missing") as caught:
        wl.apply(base, adapter, out=tmp_path / "out")
    assert any(f"{key}x: unknown" == line for line in caught.value.offenders)
    save_file(tensors | {key: torch.zeros(15, 2)}, file)
    with pytest.raises(MisfitError, match="LOHA") as caught:
        wl.apply(base, adapter, out=tmp_path / "out")
    assert caught.value.offenders == ("model.layers.0.mlp.down_proj",)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [10**6, -1])
def test_indices_of_shira_outside_the_weight(tmp_path: Path, index: int) -> None:
    """Without a check torch writes there, and the process ends."""
    base, adapter, _ = made(tmp_path, "shira")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "indices" in name)[1, 0] = index
    save_file(tensors, file)
    with pytest.raises(MisfitError, match="ind"):
        wl.apply(base, adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_this_peft_does_not_know(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, "loha")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"some_day": 3, "never": None}))
    with pytest.raises(UnsupportedFormatError, match="some_day = 3"):
        wl.apply(base, adapter, out=tmp_path / "out")


@pytest.mark.parametrize("settings", [{"r": 10**9}, {"rank_pattern": {"down_proj": 10**9}}])
def test_sizes_that_nothing_has_are_refused_before_room_is_made(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, adapter, _ = made(tmp_path, "loha")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(MalformedFileError, match="1000000000"):
        wl.apply(base, adapter, out=tmp_path / "out")


def test_a_head_and_a_base_without_one(tmp_path: Path) -> None:
    """The network of the one has `model.` before its names, and that of the other not: both ways it fits."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: Any = gpt2()
        network.save_pretrained(tmp_path / "whole")
        network.transformer.save_pretrained(tmp_path / "bare")
        for name, owner in (("of whole", network), ("of bare", network.transformer)):
            configuration = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], init_ia3_weights=False)
            model = peft.get_peft_model(owner, configuration)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.full_like(parameter, 1.5))
            model.save_pretrained(tmp_path / name)
            model.unload()
    for base, adapter in (("whole", "of bare"), ("bare", "of whole")):
        clean = load_file(tmp_path / base / "model.safetensors")
        wl.apply(tmp_path / base, tmp_path / adapter, out=tmp_path / f"{adapter} out")
        found = load_file(tmp_path / f"{adapter} out" / "model.safetensors")
        changed = {name for name in found if not torch.equal(found[name], clean[name])}
        assert changed == {name for name in found if "c_attn.weight" in name} and len(changed) == 2
        assert all(torch.allclose(found[name], 1.5 * clean[name]) for name in changed)
