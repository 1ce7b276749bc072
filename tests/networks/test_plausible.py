"""Networks get no larger than the tensors of their files make plausible, and configurations are looked at before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import weightlab as wl
from weightlab.errors import MalformedFileError, MissingInputError, UnknownNetworkError
from weightlab.networks import plausible
from weightlab.networks.configuration import model_class, read_configuration
from weightlab.networks.made import needed_network, network_in
from weightlab.networks.plausible import require_plausible, within_bounds
from weightlab.tensors.spec import TensorSpec

SPECS = {
    "model.layers.0.self_attn.q_proj.weight": TensorSpec("model.layers.0.self_attn.q_proj.weight", "F32", (16, 16)),
    "emb.weight": TensorSpec("emb.weight", "F32", (8, 4)),
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
LLAVA: dict[str, Any] = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}


def write(folder: Path, config: object) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_a_plausible_network_is_made(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network = needed_network(write(tmp_path, LLAMA), SPECS)
    assert type(network).__name__ == "LlamaForCausalLM"
    assert {tuple(p.shape) for p in network.parameters()} == {(8, 16), (16, 16), (24, 16), (16, 24), (16,)}
    assert all(p.is_meta for p in network.parameters())


HUGE = {
    "layers": LLAMA | {"num_hidden_layers": 10**9},
    "layers, not so many": LLAMA | {"num_hidden_layers": 60_000},
    "width": LLAMA | {"hidden_size": 10**9},
    "width that no tensor can have": LLAMA | {"hidden_size": 2**62},
    "width, not so large": LLAMA | {"hidden_size": 2**18},
    "tokens": LLAMA | {"vocab_size": 10**12},
    "heads": LLAMA | {"num_attention_heads": 10**9},
    "experts": MIXTRAL | {"num_local_experts": 10**9},
    "experts, not so many": MIXTRAL | {"num_local_experts": 2**16},
    "labels": LLAMA | {"num_labels": 10**10},
    "a part": LLAVA | {"text_config": LLAMA | {"num_hidden_layers": 10**9}},
    "another part": LLAVA | {"vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 50_000}},
    "stages": {"model_type": "swin", "architectures": ["SwinModel"], "depths": [60_000] * 50_000},
    "below nought": LLAMA | {"num_hidden_layers": -(10**9)},
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_network_too_large_for_its_tensors_is_not_made(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    assert network_in(write(tmp_path, HUGE[kind]), SPECS) is None
    with pytest.raises(UnknownNetworkError):
        needed_network(tmp_path, SPECS)


def test_numbers_are_named_with_their_places(tmp_path: Path) -> None:
    tree = {"text_config": {"num_hidden_layers": 10**9}, "depths": [40_000, 40_000], "num_labels": 2**21, "x": "y"}
    with pytest.raises(UnknownNetworkError) as caught:
        require_plausible(tree, SPECS, "config.json")
    assert list(caught.value.offenders) == [
        "depths = 80000",
        "num_labels = 2097152",
        "text_config.num_hidden_layers = 1000000000",
    ]


@pytest.mark.parametrize(
    "tree",
    [
        {"vocab_size": 2**20, "num_hidden_layers": 2**16},
        {"rope_theta": 10**9, "max_position_embeddings": 10**8, "sliding_window": 2**40, "eos_token_id": [2**22, 5]},
        {"text_config": {"original_max_position_embeddings": 2**30}, "bos_token_id": 2**21, "n_ctx": 2**22},
        {"use_cache": True, "layer_types": ["full"] * 100, "rms_norm_eps": 1e30, "nothing": None},
    ],
)
def test_what_real_configurations_have_is_plausible(tree: dict[str, Any]) -> None:
    require_plausible(tree, SPECS, "config.json")


def test_a_vocabulary_that_the_file_has_is_plausible() -> None:
    specs = {"emb": TensorSpec("emb", "F32", (2**21, 2))}
    require_plausible({"vocab_size": 2**21}, specs, "config.json")
    with pytest.raises(UnknownNetworkError, match="cannot have"):
        require_plausible({"vocab_size": 2**22 + 1}, specs, "config.json")


def test_modules_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plausible, "MODULES", 10)
    monkeypatch.setattr(plausible, "MODULES_A_TENSOR", 2)
    with within_bounds(SPECS):  # 14: seven modules with a parameter each
        nn.Sequential(*(nn.PReLU() for _ in range(7)))
    with pytest.raises(UnknownNetworkError, match="more than 14 modules"), within_bounds(SPECS):
        nn.Sequential(*(nn.PReLU() for _ in range(8)))
    nn.Sequential(*(nn.PReLU() for _ in range(20)))  # afterwards nothing is counted


def test_elements_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plausible, "ELEMENTS", 100)
    monkeypatch.setattr(plausible, "ELEMENTS_A_BYTE", 0.5)
    bytes_of_both = 16 * 16 * 4 + 8 * 4 * 4
    with within_bounds(SPECS):
        nn.Linear(100 + bytes_of_both // 2, 1, bias=False)
    with pytest.raises(UnknownNetworkError, match="more than"), within_bounds(SPECS):
        nn.Linear(101 + bytes_of_both // 2, 1, bias=False)


WRONG: dict[str, tuple[object, type[Exception] | None]] = {
    "no JSON": ("{", MalformedFileError),
    "nested": ('{"a":' + "[" * 100_000, MalformedFileError),
    "a list": ([], MalformedFileError),
    "no UTF-8": ('{"a": "\udcff"}', MalformedFileError),
    "model_type is a list": ({"model_type": ["x"]}, MalformedFileError),
    "model_type is a number": ({"model_type": 3}, MalformedFileError),
    "architectures is a text": (LLAMA | {"architectures": "LlamaForCausalLM"}, MalformedFileError),
    "architectures [true]": (LLAMA | {"architectures": [True]}, MalformedFileError),
    "auto_map is a text": (LLAMA | {"auto_map": "x"}, MalformedFileError),
    "architectures []": (LLAMA | {"architectures": []}, None),
    "architectures ['pipeline']": (LLAMA | {"architectures": ["pipeline"]}, None),
    "architectures ['logging']": (LLAMA | {"architectures": ["logging"]}, None),
    "architectures ['AutoModel']": (LLAMA | {"architectures": ["AutoModel"]}, None),
    "architectures ['PreTrainedModel']": (LLAMA | {"architectures": ["PreTrainedModel"]}, None),
    "architectures ['LlamaPreTrainedModel']": (LLAMA | {"architectures": ["LlamaPreTrainedModel"]}, None),
    "architectures ['LlamaConfig']": (LLAMA | {"architectures": ["LlamaConfig"]}, None),
    "architectures ['__class__']": (LLAMA | {"architectures": ["__class__"]}, None),
    "architectures ['']": (LLAMA | {"architectures": [""]}, None),
    "architectures ['a.b']": (LLAMA | {"architectures": ["models.llama"]}, None),
    "another network's class": (LLAMA | {"architectures": ["ViTModel"]}, None),
    "dtype BF16": (LLAMA | {"dtype": "BF16"}, None),
    "dtype of a number": (LLAMA | {"dtype": 3}, None),
    "layers as text": (LLAMA | {"num_hidden_layers": "x"}, None),
    "no width": (LLAMA | {"hidden_size": 0}, None),
    "width below nought": (LLAMA | {"hidden_size": -16}, None),
    "heads that do not divide": (LLAMA | {"num_attention_heads": 0}, None),
    "rope is a text": (LLAMA | {"rope_scaling": "x"}, None),
    "rope of an unknown kind": (LLAMA | {"rope_scaling": {"rope_type": "x", "factor": "y"}}, None),
    "labels in a list": (LLAMA | {"id2label": [1, 2]}, None),
    "a part that is a text": (LLAVA | {"text_config": "x"}, None),
    "a quantisation that is a text": (LLAMA | {"quantization_config": "x"}, None),
    "an unknown kind": ({"model_type": "nothing"}, None),
    "another file": (LLAMA | {"configuration_files": ["config.4.0.0.json"]}, None),
    "nothing": ({}, None),
}
MADE = ("dtype", "labels in", "quantisation", "rope", "heads")  # transformers takes some of these


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_configuration_is_an_error_of_ours_or_no_network(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    config, error = WRONG[kind]
    if isinstance(config, str):
        (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    else:
        write(tmp_path, config)
    if error is not None:
        with pytest.raises(error, match=r"config\.json"):
            network_in(tmp_path, SPECS)
        return
    network = network_in(tmp_path, SPECS)
    if network is None:
        with pytest.raises(UnknownNetworkError):
            needed_network(tmp_path, SPECS)
    else:
        assert any(word in kind for word in MADE), kind


@pytest.mark.parametrize("kind", [k for k in WRONG if WRONG[k][1] is None and "quantisation" not in k])
def test_commands_that_can_do_without_a_network_do_so(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    base = {"model.layers.0.self_attn.q_proj.weight": torch.eye(16), "embed_tokens.weight": torch.ones(8, 4)}
    model = tmp_path / "m"
    model.mkdir()
    save_file(base, model / "model.safetensors")
    write(model, WRONG[kind][0])
    wl.transfer(model, model, model, tmp_path / "out", forecast=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


def test_infinity_is_read_as_mamba_writes_it(tmp_path: Path) -> None:
    write(tmp_path, '{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert read_configuration(tmp_path, SPECS)["time_step_limit"] == [0.0, float("inf")]


def test_without_a_configuration_there_is_no_network(tmp_path: Path) -> None:
    assert network_in(tmp_path, SPECS) is None
    with pytest.raises(MissingInputError):
        needed_network(tmp_path, SPECS)


def test_classes_of_networks_alone_are_networks() -> None:
    pytest.importorskip("transformers")
    assert [model_class(name) is None for name in ("BertModel", "LlamaForCausalLM", "GPT2LMHeadModel")] == [False] * 3
    others = ("pipeline", "logging", "AutoModel", "PreTrainedModel", "BertPreTrainedModel", "models", "Trainer", "x y")
    assert [name for name in others if model_class(name) is not None] == []
