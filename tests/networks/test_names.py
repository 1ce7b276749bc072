"""Patches by the names of files on modules of transformers: the logits of what `apply --out` writes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.errors import MisfitError, UnsupportedFormatError
from weightlab.networks.made import order_of
from weightlab.networks.names import file_order, file_tensors


def vision(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        import transformers as hf

        small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
        if kind == "vit":
            return hf.ViTForImageClassification(hf.ViTConfig(**small, intermediate_size=32, patch_size=8))
        if kind == "dinov2":
            return hf.Dinov2ForImageClassification(hf.Dinov2Config(**small, mlp_ratio=2, patch_size=8))
        shape: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
        return hf.SwinForImageClassification(hf.SwinConfig(**shape, image_size=16, patch_size=2))

    return build


def language(kind: str) -> Callable[[], Any]:
    def build() -> Any:
        import transformers as hf

        shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        if kind == "mixtral":
            config = hf.MixtralConfig(**shape, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)
            return hf.MixtralForCausalLM(config)
        if kind == "gpt_neox":
            return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**shape, intermediate_size=24))
        return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, intermediate_size=24, tie_word_embeddings=True))

    return build


KINDS: dict[str, tuple[Callable[[], Any], int, int]] = {  # how many tensors are in the files, and under other names
    "vit": (vision("vit"), 40, 32),
    "dinov2": (vision("dinov2"), 45, 16),
    "swin": (vision("swin"), 45, 26),
    "mixtral": (language("mixtral"), 41, 26),
    "gpt_neox": (language("gpt_neox"), 28, 1),
    "llama_tied": (language("llama"), 20, 0),
}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """(a module, the folder it was saved to, the folder of a fine-tune of it)."""
    torch.manual_seed(0)
    module = KINDS[request.param][0]().eval()
    module.save_pretrained(tmp_path / "base")
    tuned = KINDS[request.param][0]()
    tuned.load_state_dict(module.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    return module, tmp_path / "base", tmp_path / "tuned"


def logits(module: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if "vocab_size" in module.config.to_dict():
            return module(torch.randint(0, 32, (2, 7), generator=generator)).logits
        return module(torch.rand(2, 3, 16, 16, generator=generator)).logits


def from_disk(module: Any, folder: Path) -> Tensor:
    return logits(type(module).from_pretrained(folder).eval())


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_names_and_values_are_those_of_the_files(pair: tuple[Any, Path, Path], request: pytest.FixtureRequest) -> None:
    module, base, _ = pair
    stored = load_file(base / "model.safetensors")
    found = file_tensors(module)
    _, count, renamed = KINDS[request.node.callspec.params["pair"]]
    assert len(stored) == count and len(set(stored) - set(bits(module))) == renamed
    assert set(stored) <= set(found) and all(torch.equal(found[n], t) for n, t in stored.items())
    assert file_order(module) == list(found)
    memory = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
    assert {t.untyped_storage().data_ptr() for t in found.values()} == memory  # views, no copies


@pytest.mark.parametrize("encode", ["exact", "dense", "low_rank:2"])
def test_logits_in_memory_are_those_of_what_is_written(pair: tuple[Any, Path, Path], encode: str) -> None:
    module, base, tuned = pair
    patch = wl.diff(base, tuned, encode=encode)
    before, clean = bits(module), logits(module)
    wl.apply(base, patch, out=base.parent / "out")
    with wl.patched(module, patch) as stack:
        assert torch.equal(logits(module), from_disk(module, base.parent / "out"))
        assert not torch.equal(logits(module), clean)
        if encode == "exact":
            assert torch.equal(logits(module), from_disk(module, tuned))
        wl.apply(base, 0.5 * patch, out=base.parent / "half")
        stack.set(patch, 0.5)
        assert torch.equal(logits(module), from_disk(module, base.parent / "half"))
    assert same(bits(module), before) and torch.equal(logits(module), clean)


def test_one_expert_of_many_and_two_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = language("mixtral")().eval()
    module.save_pretrained(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    tuned = {n: t + 0.1 * torch.randn_like(t) for n, t in state.items()}
    expert = wl.diff(state, tuned, encode="dense", include="*.layers.1.*.experts.2.w2.weight")
    gate = wl.diff(state, tuned, encode="exact", include=["*.experts.2.*", "*.gate.weight"])
    assert len(expert.records) == 1
    before = bits(module)
    with wl.patched(module, expert):
        changed = {n: t != before[n] for n, t in bits(module).items() if not torch.equal(t, before[n])}
        (name,) = changed
        assert name == "model.layers.1.mlp.experts.down_proj"
        assert changed[name].any((1, 2)).tolist() == [False, False, True, False]
    wl.apply(tmp_path / "base", [expert, -0.5 * gate], out=tmp_path / "out")
    with wl.patched(module, [expert, -0.5 * gate]):
        assert torch.equal(logits(module), from_disk(module, tmp_path / "out"))
    assert same(bits(module), before)


def test_names_without_a_partner_are_all_listed() -> None:
    module = vision("vit")()
    before = bits(module)
    names = ["vit.encoder.layer.7.output.dense.bias", "nowhere"]
    patch = wl.diff({n: torch.zeros(2) for n in names}, {n: torch.ones(2) for n in names}, encode="dense")
    with pytest.raises(MisfitError) as failed, wl.patched(module, patch):
        pytest.fail("it does not fit")
    assert sorted(o.partition(" ")[0].rstrip(":") for o in failed.value.offenders) == sorted(names)
    assert same(bits(module), before)


def test_what_is_scattered_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    module = language("mixtral")()
    real = core_model_loading.revert_weight_conversion

    def shuffled(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found = real(model, state)
        return {n: t.flip(0) if ".experts.1.w2" in n else t for n, t in found.items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", shuffled)
    with pytest.raises(UnsupportedFormatError, match="scattered") as failed:
        file_tensors(module)
    assert [o.partition(" ")[0] for o in failed.value.offenders] == [
        f"model.layers.{i}.block_sparse_moe.experts.1.w2.weight" for i in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_the_order_is_known_without_weights(tmp_path: Path, kind: str) -> None:
    build = KINDS[kind][0]
    module = build()
    with torch.device("meta"):
        assert file_order(build()) == file_order(module)
    module.save_pretrained(tmp_path)
    order = order_of(tmp_path, {})
    assert order == file_order(module)
    first = {"vit": "vit.embeddings.cls_token", "mixtral": "model.embed_tokens.weight"}
    assert order is not None and order[0] == first[kind]
    (tmp_path / "config.json").write_text("{}")
    assert order_of(tmp_path, {}) is None and order_of(tmp_path / "model.safetensors", {}) is None


def test_plain_modules_go_by_their_state_dict() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert file_order(module) == list(module.state_dict())
