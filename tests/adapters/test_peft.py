"""Adapters of every kind against peft itself: what `apply --out` writes is what `merge_and_unload` gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlab as wl

transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")
peft = pytest.importorskip("peft", reason="peft is an extra")

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=False, **options)
    return transformers.LlamaForCausalLM(config)


def tied_llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=3))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**SMALL, **HEADS, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, and attention with its projections in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(4, 6, 3), nn.Conv2d(6, 4, (1, 3)), nn.Conv3d(4, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2)


def untied_gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "rank_pattern": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}},
    ),
    "alpha_pattern": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "v_proj": 1}},
    ),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": (tied_llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "convolution": (resnet, {"target_modules": ["convolution"]}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one of the experts' parameters": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[:1]}),
    "whole experts": (mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "experts with patterns": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 5},
        },
    ),
    "transposed experts": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "a matrix as parameter": (llama, {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]}),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "classifier": (vit, {"target_modules": ["query", "q_proj"], "modules_to_save": ["classifier"]}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "lora's own biases": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bias of B": (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "trainable tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "trainable tokens by name": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [5]}},
    ),
    "trainable tokens, tied": (tied_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora, embedding": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "dora, convolution": (resnet, {"target_modules": ["convolution"], "use_dora": True}),
    "dora, rslora": (llama, {"target_modules": ["o_proj"], "use_dora": True, "use_rslora": True}),
    "some layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "Conv1D beside a Linear": (untied_gpt2, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "oblong Conv1D beside a Linear": (untied_gpt2, {"target_modules": ["c_attn", "mlp.c_fc", "lm_head"]}),
    "dora, Conv1D beside a Linear": (untied_gpt2, {"target_modules": ["attn.c_proj", "lm_head"], "use_dora": True}),
    "both ends of a tie, saved": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "dora, fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
}


def made(folder: Path, kind: str) -> tuple[Path, Path, dict[str, Tensor]]:
    """(base, adapter, the tensors that peft's merge is saved with)."""
    make, options = KINDS[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = make()
        network.save_pretrained(folder / "base")
        model = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / "adapter")
        kind_of: Any = type(network)
        fresh = kind_of.from_pretrained(folder / "base")
        merged = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", load_file(folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    base, adapter, merged = made(tmp_path, kind)
    clean = load_file(base / "model.safetensors")
    wl.apply(base, adapter, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == merged.keys() == clean.keys()
    for name, tensor in merged.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max())), name
    changed = {n for n, t in merged.items() if not torch.equal(t, clean[n])}
    assert changed and changed == {n for n, t in found.items() if not torch.equal(t, clean[n])}


@pytest.mark.parametrize("kind", ["linear", "tied embedding", "experts", "convolution", "trainable tokens", "dora"])
def test_in_place_and_in_memory_it_is_the_same(tmp_path: Path, kind: str) -> None:
    base, adapter, _ = made(tmp_path, kind)
    first = (base / "model.safetensors").read_bytes()
    wl.apply(base, f"{adapter}@0.5", out=tmp_path / "out")
    wl.apply(base, f"{adapter}@0.5", in_place=True)
    assert (base / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    wl.remove(base, adapter)
    assert (base / "model.safetensors").read_bytes() == first
    kind_of: Any = type(KINDS[kind][0]())
    network = kind_of.from_pretrained(base).eval()
    loaded = kind_of.from_pretrained(tmp_path / "out").eval()
    with wl.patched(network, f"{adapter}@0.5"):
        state = {n: t.clone() for n, t in network.state_dict().items()}
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"two": 2}}, {"use_dora": True}])
def test_convolutions_and_packed_attention_of_a_network_of_torch(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    targets = ["one", "two", "three", *([] if "use_dora" in options else ["attention"])]
    network = Convolutions()
    clean = {n: t.clone() for n, t in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
        model = peft.get_peft_model(network, configuration)
        model.save_pretrained(tmp_path / "adapter")
        merged = model.merge_and_unload().state_dict()
    found = wl.apply(clean, tmp_path / "adapter")
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max())), name
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, clean[name])}
    packed = {"attention.in_proj_weight", "attention.out_proj.weight"} if "attention" in targets else set()
    assert changed == {"one.weight", "two.weight", "three.weight"} | packed


@torch.no_grad()
def test_both_ends_of_a_tie_count_once(tmp_path: Path) -> None:
    """peft's merge adds the change of a tied weight at both ends; what it computes with before merging is right."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = tied_llama()
        network.save_pretrained(tmp_path / "base")
        configuration = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
        model = peft.get_peft_model(network, configuration).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8)[None]
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = model(input_ids=tokens).logits
    assert torch.allclose(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )


RESIZED: dict[str, dict[str, Any]] = {
    "trained tokens": {"trainable_token_indices": [40, 41, 42]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora, tied": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", RESIZED)
def test_a_vocabulary_that_was_resized(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = tied_llama if "tied" in kind else llama
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make().save_pretrained(tmp_path / "base")
        network = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        network.resize_token_embeddings(43)
        options = {"target_modules": ["q_proj"], **RESIZED[kind]}
        configuration = peft.LoraConfig(r=4, base_model_name_or_path=str(tmp_path / "base"), **options)
        model = peft.get_peft_model(network, configuration)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
        merged = model.merge_and_unload().state_dict()
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded["model.embed_tokens.weight"].shape == (43, 16) and loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(loaded[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max())), name


def test_a_head_with_a_bias_that_was_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.PhiConfig(**SMALL, num_attention_heads=2, tie_word_embeddings=False)
    merged = _adapted(
        tmp_path,
        transformers.PhiForCausalLM(config),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda network: network.resize_token_embeddings(43),
    )
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    loaded = transformers.PhiForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded["lm_head.bias"].shape == (43,) and loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(loaded[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max())), name


def test_a_tied_head_that_was_resized_with_its_bias(tmp_path: Path) -> None:
    """BERT's head has its bias under two names; peft saves the one that the files do not have."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    network, options = transformers.BertForMaskedLM(config), {"target_modules": ["query"]}
    merged = _adapted(tmp_path, network, options, lambda network: network.resize_token_embeddings(43))
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded["cls.predictions.bias"].shape == (43,) and loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.allclose(loaded[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max())), name


def test_one_end_of_a_tie_that_was_trained_apart_is_refused(tmp_path: Path) -> None:
    """peft keeps a copy of the embedding, so the head stays as it was; with `ensure_weight_tying` both are one."""
    torch.manual_seed(0)
    merged = _adapted(tmp_path, tied_llama(), {"modules_to_save": ["embed_tokens"]})
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    with pytest.raises(wl.WeightlabError, match=r"lm_head\.weight in the same tensor") as caught:
        wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    assert caught.value.exit_code == 4 and "--allow added" in str(caught.value)
    assert not (tmp_path / "out").exists()
    # What the error tells to do gives what peft has.
    save_file({name: tensor.clone() for name, tensor in merged.items()}, tmp_path / "merged.safetensors")
    patch = wl.diff(tmp_path / "base", tmp_path / "merged.safetensors", allow=["added"])
    patch.save(tmp_path / "patch.safetensors")
    wl.apply(tmp_path / "base", tmp_path / "patch.safetensors", out=tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())


def test_both_ends_of_a_tie_that_was_kept_are_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    merged = _adapted(tmp_path, tied_llama(), options)
    wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(found, merged["lm_head.weight"]) and torch.equal(found, merged["model.embed_tokens.weight"])


def test_trained_tokens_of_the_old_vocabulary_are_not_called_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _adapted(tmp_path, llama(), {"trainable_token_indices": [1, 5]})
    done = wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    assert not any("tokenizer" in note for note in done.notes)


def test_trained_tokens_beyond_the_vocabulary_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"trainable_token_indices": [41, 42]}
    grown = lambda network: network.resize_token_embeddings(43)  # noqa: E731
    _adapted(tmp_path, llama(), options, grown, save_embedding_layers=False)
    with pytest.raises(wl.WeightlabError, match="token 42 was trained, and the adapter was saved without"):
        wl.apply(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")


def _adapted(
    folder: Path,
    network: nn.Module,
    options: dict[str, Any],
    change: Callable[[Any], Any] = lambda network: None,
    **saving: Any,
) -> dict[str, Tensor]:
    """Writes base/ and adapter/, with random values for all that is trained; what peft merges, by name."""
    made: Any = network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder / "base")
        change(made)
        configuration = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
        model = peft.get_peft_model(made, configuration)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / "adapter", **saving)
        merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


def test_convolutions_in_groups_do_not_fold(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    clean = dict(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(NotImplementedError):
            model.merge_and_unload()
    with pytest.raises(wl.WeightlabError, match="in groups") as caught:
        wl.apply(clean, tmp_path / "adapter")
    assert caught.value.offenders == ("0",)
