"""Adapters of MLX, torchtune and llama.cpp, and PEFT's in one file: each is what its own program merges."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from tests.adapters.forms.test_kohya import close, random
from weightlab.errors import (
    MalformedFileError,
    NamesMismatchError,
    UnsupportedFormatError,
    UsageError,
)

transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")

HIDDEN, HEADS, KEYS, SIZE = 16, 4, 2, 4
LAYER = "model.layers.0"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def mlx(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    told = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}, "model": "m/n"}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


def test_mlx(tmp_path: Path, llama: Path) -> None:
    """The scale is used as it is, whatever the rank; an embedding's factors lie the other way."""
    q, up = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj"
    tensors = {f"{q}.lora_a": random(16, 4), f"{q}.lora_b": random(4, 16)}
    tensors |= {f"{up}.lora_a": random(16, 4), f"{up}.lora_b": random(4, 24)}
    tensors |= {"model.embed_tokens.lora_a": random(40, 4), "model.embed_tokens.lora_b": random(4, 16)}
    clean, adapter = weights(llama), mlx(tmp_path / "adapter", tensors)
    of_q = 20 * (random(16, 4).double() @ random(4, 16).double()).T
    of_up = 20 * (random(16, 4).double() @ random(4, 24).double()).T
    for operand in (adapter, adapter / "adapters.safetensors"):
        found = wl.apply(clean, operand)
        assert close(found[f"{q}.weight"], clean[f"{q}.weight"] + of_q)
        assert close(found[f"{up}.weight"], clean[f"{up}.weight"] + of_up)
        embedded = clean["model.embed_tokens.weight"] + 20 * (random(40, 4).double() @ random(4, 16).double())
        assert close(found["model.embed_tokens.weight"], embedded)
    wl.apply(llama, adapter, out=tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")[f"{q}.weight"], found[f"{q}.weight"])


def test_mlx_dora_and_full(tmp_path: Path, llama: Path) -> None:
    name = f"{LAYER}.mlp.up_proj"
    tensors = {f"{name}.lora_a": random(16, 4), f"{name}.lora_b": random(4, 24), f"{name}.m": random(24).abs() + 0.1}
    clean = weights(llama)
    found = wl.apply(clean, mlx(tmp_path / "adapter", tensors, fine_tune_type="dora"))
    moved = clean[f"{name}.weight"] + 20 * (random(16, 4).double() @ random(4, 24).double()).T
    right = moved / moved.square().sum(1, keepdim=True).sqrt() * (random(24).abs() + 0.1)[:, None].double()
    assert close(found[f"{name}.weight"], right)
    full = mlx(tmp_path / "full", {f"{name}.weight": random(24, 16)}, fine_tune_type="full")
    assert close(wl.apply(clean, full)[f"{name}.weight"], random(24, 16))


@pytest.mark.parametrize("names", [("gate_proj", "mlp"), ("w1", "block_sparse_moe")])
def test_mlx_of_stacked_experts(tmp_path: Path, names: tuple[str, str]) -> None:
    name, block = names
    home = f"{LAYER}.{block}"
    state = {f"{home}.experts.{expert}.{name}.weight": random(24, 16) + expert for expert in range(3)}
    tensors = {f"{home}.switch_mlp.gate_proj.lora_a": random(3, 4, 16)}
    tensors |= {f"{home}.switch_mlp.gate_proj.lora_b": random(3, 24, 4)}
    found = wl.apply(state, mlx(tmp_path / "adapter", tensors))
    for expert in range(3):
        delta = 20 * (random(3, 24, 4)[expert].double() @ random(3, 4, 16)[expert].double())
        assert close(found[f"{home}.experts.{expert}.{name}.weight"], random(24, 16) + expert + delta)


def test_mlx_with_alpha_beside_the_scale_says_so(tmp_path: Path, llama: Path) -> None:
    name = f"{LAYER}.mlp.up_proj"
    tensors = {f"{name}.lora_a": random(16, 4), f"{name}.lora_b": random(4, 24)}
    told = {"rank": 4, "scale": 20, "alpha": 8}
    done = wl.apply(llama, mlx(tmp_path / "adapter", tensors, lora_parameters=told), out=tmp_path / "out")
    assert any("alpha beside scale" in note for note in done.notes)
    right = weights(llama)[f"{name}.weight"] + 20 * (random(16, 4).double() @ random(4, 24).double()).T
    assert close(weights(tmp_path / "out")[f"{name}.weight"], right)


def test_mlx_on_convolutions_of_gpt2(tmp_path: Path) -> None:
    """MLX has GPT-2's layers as Linear; the files keep them the other way round."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    clean = weights(tmp_path / "base")
    name = next(n.removesuffix(".weight") for n in clean if n.endswith("attn.c_proj.weight"))
    tensors = {f"{name}.lora_a": random(16, 4), f"{name}.lora_b": random(4, 16)}
    wl.apply(tmp_path / "base", mlx(tmp_path / "adapter", tensors), out=tmp_path / "out")
    right = clean[f"{name}.weight"] + 20 * (random(16, 4).double() @ random(4, 16).double())
    assert close(weights(tmp_path / "out")[f"{name}.weight"], right)


def test_mlx_refused(tmp_path: Path, llama: Path) -> None:
    name = f"{LAYER}.mlp.up_proj"
    tensors = {f"{name}.lora_a": random(16, 4), f"{name}.lora_b": random(4, 24)}
    folder = mlx(tmp_path / "adapter", tensors, fine_tune_type="other")
    with pytest.raises(UnsupportedFormatError, match="'other'"):
        wl.apply(llama, folder, out=tmp_path / "out")
    for config in ({"lora_parameters": {"rank": 4}}, {"lora_parameters": None}):
        with pytest.raises(UsageError, match="scale"):
            wl.apply(llama, mlx(folder, tensors, **config), out=tmp_path / "out")
    with pytest.raises(MalformedFileError, match=r"lora_parameters\.scale"):
        wl.apply(llama, mlx(folder, tensors, lora_parameters={"scale": "x"}), out=tmp_path / "out")
    stacked = {f"{LAYER}.mlp.switch_mlp.up_proj.lora_{side}": random(3, 4, 16) for side in "ab"}
    with pytest.raises(MalformedFileError, match="make no sense") as failed:
        wl.apply(llama, mlx(folder, {**tensors, **stacked}), out=tmp_path / "out")
    assert "switch_mlp" in failed.value.offenders[0]
    with pytest.raises(MalformedFileError, match="missing"):
        wl.apply(llama, mlx(folder, {f"{name}.lora_a": random(16, 4)}), out=tmp_path / "out")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"adapter_config\.json"):
        wl.apply(llama, folder, out=tmp_path / "out")


def paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of a projection as Meta's code has them: the two halves of each head's rotary pairs side by side."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(rows.shape)


def tune(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_3.pt")
    torch.save({name: tensor * 9 for name, tensor in tensors.items()}, folder / "adapter_0.pt")  # an earlier epoch
    told = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


def test_torchtune(tmp_path: Path, llama: Path) -> None:
    """B is made in the order of transformers, and kept in torchtune's."""
    clean, tensors, right = weights(llama), {}, {}
    names = {
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.output_proj": "self_attn.o_proj",
    }
    names |= {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}
    for theirs, ours in names.items():
        rows, columns = clean[f"{LAYER}.{ours}.weight"].shape
        up, down = random(rows, 4), random(4, columns)
        right[f"{LAYER}.{ours}.weight"] = clean[f"{LAYER}.{ours}.weight"] + 2 * (up.double() @ down.double())
        heads = {"attn.q_proj": HEADS, "attn.k_proj": KEYS}.get(theirs)
        tensors[f"layers.0.{theirs}.lora_a.weight"] = down
        tensors[f"layers.0.{theirs}.lora_b.weight"] = up if heads is None else paired(up, heads)
    tensors |= {"output.lora_a.weight": random(4, 16), "output.lora_b.weight": random(40, 4)}
    right["lm_head.weight"] = clean["lm_head.weight"] + 2 * (random(40, 4).double() @ random(4, 16).double())
    wl.apply(llama, tune(tmp_path / "adapter", tensors), out=tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(close(found[name], tensor) for name, tensor in right.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in clean.items() if name not in right)


def test_torchtune_dora(tmp_path: Path, llama: Path) -> None:
    """The lengths of the rows of a query projection lie in torchtune's order, too."""
    name = f"{LAYER}.self_attn.q_proj.weight"
    up, down, lengths = random(16, 4), random(4, 16), random(16).abs() + 0.1
    tensors = {"lora_a.weight": down, "lora_b.weight": paired(up, HEADS), "magnitude": paired(lengths, HEADS)}
    folder = tune(tmp_path / "adapter", {f"layers.0.attn.q_proj.{part}": tensor for part, tensor in tensors.items()})
    wl.apply(llama, folder, out=tmp_path / "out")
    moved = weights(llama)[name] + 2 * (up.double() @ down.double())
    right = moved / moved.square().sum(1, keepdim=True).sqrt() * lengths[:, None].double()
    assert close(weights(tmp_path / "out")[name], right)


def test_torchtune_refused(tmp_path: Path, llama: Path) -> None:
    tensors = {"layers.0.attn.q_proj.lora_a.weight": random(4, 16), "layers.0.attn.q_proj.lora_b.weight": random(16, 4)}
    folder = tune(tmp_path / "adapter", tensors)
    with pytest.raises(UsageError, match="number of heads"):
        wl.apply(weights(llama), folder)
    config = json.loads((llama / "config.json").read_text())
    for kind, error in (("unheard_of", UnsupportedFormatError), ("qwen2", None)):
        (llama / "config.json").write_text(json.dumps(config | {"model_type": kind, "architectures": []}))
        if error is not None:
            with pytest.raises(error, match="unheard_of"):
                wl.apply(llama, folder, out=tmp_path / "out")
            continue
        wl.apply(llama, folder, out=tmp_path / "out")  # rows lie as in transformers
        name = f"{LAYER}.self_attn.q_proj.weight"
        right = weights(llama)[name] + 2 * (random(16, 4).double() @ random(4, 16).double())
        assert close(weights(tmp_path / "out")[name], right)
    with pytest.raises(UnsupportedFormatError, match="no counterpart"):
        wl.apply(llama, tune(folder, {**tensors, "layers.0.fusion.x.lora_a.weight": random(4, 16)}), out=tmp_path / "o")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match="alpha"):
        wl.apply(llama, folder, out=tmp_path / "o")


def gguf_adapter(path: Path, tensors: dict[str, Tensor], alpha: float = 8.0, **fields: str) -> Path:
    gguf = pytest.importorskip("gguf", reason="gguf is an extra")
    told = {"type": "adapter", "adapter": "lora", "architecture": "llama"} | fields
    writer = gguf.GGUFWriter(path, told["architecture"])
    writer.add_string("general.type", told["type"])
    writer.add_string("adapter.type", told["adapter"])
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alpha", [8.0, 0.0])
def test_gguf(tmp_path: Path, llama: Path, alpha: float) -> None:
    """llama.cpp keeps the rows of queries and keys as Meta's code does; an alpha of 0 means a scale of 1."""
    clean, tensors, right = weights(llama), {}, {}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj"}
    scale = alpha / 4 if alpha else 1.0
    for theirs, ours in names.items():
        rows, columns = clean[f"{LAYER}.{ours}.weight"].shape
        up, down = random(rows, 4), random(4, columns)
        right[f"{LAYER}.{ours}.weight"] = clean[f"{LAYER}.{ours}.weight"] + scale * (up.double() @ down.double())
        heads = {"attn_q": HEADS, "attn_k": KEYS}.get(theirs)
        tensors[f"blk.0.{theirs}.weight.lora_a"] = down
        tensors[f"blk.0.{theirs}.weight.lora_b"] = up if heads is None else paired(up, heads)
    tensors |= {"token_embd.weight.lora_a": random(40, 4), "token_embd.weight.lora_b": random(16, 4)}
    embedding = "model.embed_tokens.weight"
    right[embedding] = clean[embedding] + scale * (random(40, 4).double() @ random(16, 4).double().T)
    wl.apply(llama, gguf_adapter(tmp_path / "adapter.gguf", tensors, alpha), out=tmp_path / "out")
    found = weights(tmp_path / "out")
    assert all(close(found[name], tensor) for name, tensor in right.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in clean.items() if name not in right)


def test_gguf_refused(tmp_path: Path, llama: Path) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": random(4, 16), "blk.0.attn_q.weight.lora_b": random(16, 4)}
    out, file = tmp_path / "out", tmp_path / "adapter.gguf"
    with pytest.raises(UsageError, match="network is needed"):
        wl.apply(weights(llama), gguf_adapter(file, tensors))
    with pytest.raises(UnsupportedFormatError, match="'olmo'"):
        wl.apply(llama, gguf_adapter(file, tensors, architecture="olmo"), out=out)
    with pytest.raises(UnsupportedFormatError, match="'other'"):
        wl.apply(llama, gguf_adapter(file, tensors, adapter="other"), out=out)
    with pytest.raises(UnsupportedFormatError, match=r"blk\.9\.attn_q"):
        wl.apply(llama, gguf_adapter(file, {**tensors, "blk.9.attn_q.weight.lora_a": random(4, 16)}), out=out)
    content = gguf_adapter(file, tensors).read_bytes()
    for size in (200, len(content) - 400):
        file.write_bytes(content[:size])
        with pytest.raises(MalformedFileError, match="no whole GGUF file"):
            wl.apply(llama, file, out=out)


def test_peft_in_one_file(tmp_path: Path, llama: Path) -> None:
    name, file = f"{LAYER}.mlp.up_proj", tmp_path / "lora.safetensors"
    keys = {f"base_model.model.{name}.lora_A.default.weight": random(4, 16)}
    keys |= {f"base_model.model.{name}.lora_B.default.weight": random(24, 4)}
    delta, clean = random(24, 4).double() @ random(4, 16).double(), weights(llama)
    save_file(keys, file)
    with pytest.raises(UsageError, match="nothing in it tells alpha") as asked:
        wl.apply(llama, file, out=tmp_path / "out")
    assert asked.value.offenders == (f"{name}, rank 4",)
    save_file(keys, file, {"lora_alpha": "8"})
    assert close(wl.apply(clean, file)[f"{name}.weight"], clean[f"{name}.weight"] + 2 * delta)
    told = {"lora_alpha": 8, "alpha_pattern": {name: 2}}
    save_file(keys, file, {"lora_adapter_metadata": json.dumps(told)})
    assert close(wl.apply(clean, file)[f"{name}.weight"], clean[f"{name}.weight"] + delta / 2)
    save_file({**keys, f"{name}.alpha": torch.tensor(12.0)}, file)
    assert close(wl.apply(clean, file)[f"{name}.weight"], clean[f"{name}.weight"] + 3 * delta)
    assert wl.lora_import(file, tmp_path / "patch.safetensors").records[f"{name}.weight"].encoding == "low_rank"
    torch.save({**keys, f"{name}.alpha": torch.tensor(12.0)}, tmp_path / "lora.pt")
    assert close(wl.apply(clean, tmp_path / "lora.pt")[f"{name}.weight"], clean[f"{name}.weight"] + 3 * delta)


def test_peft_in_one_file_refused(tmp_path: Path, llama: Path) -> None:
    name, file = f"{LAYER}.mlp.up_proj", tmp_path / "lora.safetensors"

    def refused(tensors: dict[str, Tensor], error: type[Exception], match: str) -> None:
        save_file(tensors, file, {"lora_alpha": "8"})
        with pytest.raises(error, match=match):
            wl.apply(llama, file, out=tmp_path / "out")

    factors = {f"{name}.lora_A.weight": random(4, 16), f"{name}.lora_B.weight": random(24, 4)}
    refused({f"base_model.model.{name}.hada_w1_a": random(24, 4)}, UnsupportedFormatError, "more than LoRA")
    refused({**factors, f"{name}.lora_other": random(24, 16)}, UnsupportedFormatError, "more than LoRA")
    refused({f"{name}.lora_A": random(12, 16), f"{name}.lora_B": random(24, 4)}, UnsupportedFormatError, "loralib")
    refused({f"{name}.lora_A.weight": random(4, 16)}, MalformedFileError, "missing")
    several = {f"{name}.lora_A.one.weight": random(4, 16), f"{name}.lora_A.two.weight": random(4, 16)}
    refused(several, UnsupportedFormatError, "2 adapters")
    elsewhere = {f"{LAYER}.nowhere.lora_A.weight": random(4, 16), f"{LAYER}.nowhere.lora_B.weight": random(24, 4)}
    refused({**factors, **elsewhere}, NamesMismatchError, "nowhere")


def test_the_weights_of_a_peft_folder_by_their_own_path(tmp_path: Path, llama: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is an extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = transformers.LlamaForCausalLM.from_pretrained(llama)
        model = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
    wl.apply(llama, tmp_path / "adapter", out=tmp_path / "one")
    wl.apply(llama, tmp_path / "adapter" / "adapter_model.safetensors", out=tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one[f"{LAYER}.self_attn.q_proj.weight"], weights(llama)[f"{LAYER}.self_attn.q_proj.weight"])
