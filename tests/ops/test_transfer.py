"""Moving a fine-tune to another base: arithmetic, rows of embeddings, configuration."""

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
from weightlab.errors import MisfitError, NamesMismatchError, UsageError

transformers = pytest.importorskip("transformers", reason="transformers is in the extra lm")
WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat"]


def model(
    folder: Path, seed: int, *, rows: int = 8, tied: bool = False, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A small Llama that was saved by transformers."""
    options = {"vocab_size": rows, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    torch.manual_seed(seed)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, **heads, **config)).to(dtype)
    made.save_pretrained(folder)
    return folder


def shards(folder: Path, count: int) -> None:
    """Cuts a checkpoint into several files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for n in range(count):
        file = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[n::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tokenizer(folder: Path, words: list[str], **config: Any) -> None:
    """A tokenizer.json with these words in this order, and its configuration."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "model_max_length": 8} | config))


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def expected(base: Tensor, tuned: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """The formula in fp64, rounded once."""
    return (target.double() + scale * (tuned.double() - base.double())).to(target.dtype)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_every_tensor_is_the_formula_rounded_once(
    tmp_path: Path, scale: float, tied: bool, base_dtype: torch.dtype, tuned_dtype: torch.dtype
) -> None:
    base = model(tmp_path / "base", 0, tied=tied, dtype=base_dtype)
    tuned = model(tmp_path / "tuned", 1, tied=tied, dtype=tuned_dtype)
    target = model(tmp_path / "target", 2, tied=tied, dtype=base_dtype, rope_theta=500000.0, max_position_embeddings=99)
    shards(base, 2)
    shards(target, 3)
    wl.transfer(base, tuned, target, tmp_path / "out", scale=scale)
    one, two, three, out = map(weights, (base, tuned, target, tmp_path / "out"))
    assert out.keys() == three.keys() and ("lm_head.weight" in out) == (not tied)
    exact = base_dtype == torch.bfloat16
    for name, found in out.items():
        wanted = expected(one[name], two[name], three[name], scale)
        assert found.dtype == base_dtype
        assert torch.allclose(found.float(), wanted.float(), rtol=2**-7 if exact else 2**-21, atol=1e-7), name
        if exact:  # fp32 sums, then one rounding: nearly always the nearest bf16
            assert (found != wanted).float().mean() < 0.02
    assert (tmp_path / "out" / "config.json").read_bytes() == (target / "config.json").read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    wl.diff(base, tuned, tmp_path / "p.safetensors", encode="dense:fp32")
    wl.apply(target, f"{tmp_path / 'p.safetensors'}@{scale}", out=tmp_path / "other")
    other = weights(tmp_path / "other")
    assert all(torch.equal(found, other[name]) for name, found in out.items())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_go_by_token(tmp_path: Path, tied: bool) -> None:
    base = model(tmp_path / "base", 0, rows=6, tied=tied)
    tuned = model(tmp_path / "tuned", 1, rows=7, tied=tied, eos_token_id=6)
    other = ["<unk>", "</s>", "<s>", "dog", "cat", "the"]
    target = model(tmp_path / "target", 2, rows=7, tied=tied, eos_token_id=1)  # one row of padding
    tokenizer(base, WORDS)
    tokenizer(tuned, [*WORDS, "<chat>"], eos_token="<chat>", chat_template="{{ x }}", model_max_length=4)
    tokenizer(target, other, model_max_length=512)
    done = wl.transfer(base, tuned, target, tmp_path / "out")
    one, two, three, out = map(weights, (base, tuned, target, tmp_path / "out"))
    for name in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        for row, word in enumerate(other):
            wanted = three[name][row]
            if word in WORDS:
                wanted = expected(one[name][WORDS.index(word)], two[name][WORDS.index(word)], wanted)
            assert torch.allclose(out[name][row], wanted, atol=1e-6), word
        assert torch.allclose(out[name][6], two[name][6], atol=1e-6) and len(out[name]) == 7
    assert done.rows is not None and (done.rows.matched, done.rows.added, done.rows.left) == (5, {"<chat>": 6}, 1)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.convert_tokens_to_ids(["dog", "<chat>"]) == [3, 6] and loaded.eos_token == "<chat>"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == 6
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == "{{ x }}" and saved["model_max_length"] == 512
    assert {"config.json: eos_token_id", "tokenizer_config.json: chat_template"} <= set(done.carried)


def test_a_tunes_tokenizer_comes_whole_where_ids_are_the_same(tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "base", 0, rows=6), model(tmp_path / "tuned", 1, rows=9)
    target = model(tmp_path / "target", 2, rows=6)
    for folder, words in ((base, WORDS), (tuned, [*WORDS, "<a>", "<b>", "<c>"]), (target, WORDS)):
        tokenizer(folder, words)
    (tuned / "chat_template.jinja").write_text("{{ y }}")
    done = wl.transfer(base, tuned, target, tmp_path / "out")
    out = weights(tmp_path / "out")
    assert out["model.embed_tokens.weight"].shape == (9, 8) == out["lm_head.weight"].shape
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 9
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes() and name in done.carried
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 9


def test_a_larger_target_keeps_its_rows(tmp_path: Path) -> None:
    base, tuned, target = (model(tmp_path / n, i, rows=r) for i, (n, r) in enumerate([("b", 6), ("t", 6), ("v", 10)]))
    for folder, words in ((base, WORDS), (tuned, WORDS), (target, [*WORDS, "more"])):
        tokenizer(folder, words)
    done = wl.transfer(base, tuned, target, tmp_path / "out")
    out, clean = weights(tmp_path / "out"), weights(target)
    name = "model.embed_tokens.weight"
    assert torch.equal(out[name][6:], clean[name][6:]) and not torch.equal(out[name][:6], clean[name][:6])
    assert done.rows is not None and (done.rows.left, done.rows.padding) == (1, 3)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()


def test_without_tokenizers_ids_count_only_when_told(tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "base", 0, rows=6), model(tmp_path / "tuned", 1, rows=6)
    target = model(tmp_path / "target", 2, rows=7)
    with pytest.raises(MisfitError, match="--rows by-id"):
        wl.transfer(base, tuned, target, tmp_path / "out")
    with pytest.raises(UsageError, match="tokenizers"):
        wl.transfer(base, tuned, target, tmp_path / "out", rows="by-token")
    assert not (tmp_path / "out").exists()
    wl.transfer(base, tuned, target, tmp_path / "out", rows="by-id")
    out, clean = weights(tmp_path / "out"), weights(target)
    assert torch.equal(out["lm_head.weight"][6], clean["lm_head.weight"][6])


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    base, tuned, target = (model(tmp_path / name, seed) for seed, name in enumerate(("base", "tuned", "target")))
    tensors = load_file(tuned / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tuned / "model.safetensors")
    with pytest.raises(NamesMismatchError) as caught:
        wl.transfer(base, tuned, target, tmp_path / "out")
    assert "model.norm.weight" in str(caught.value) and "extra.weight" in str(caught.value)
    clean = load_file(base / "model.safetensors")
    small = {n: t[:, :4].contiguous() if "mlp" in n else t for n, t in clean.items()}
    save_file(small, base / "model.safetensors")
    with pytest.raises(NamesMismatchError, match="other shapes") as caught:
        wl.transfer(base, target, target, tmp_path / "out")
    assert str(caught.value).count("mlp") == 3 and not (tmp_path / "out").exists()


def test_an_adapter_is_moved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is an extra")
    base, target = model(tmp_path / "base", 0), model(tmp_path / "target", 2)
    network = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses what transformers has deprecated
        tuned = peft.get_peft_model(network, config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "tuned")
    wl.transfer(base, tmp_path / "adapter", target, tmp_path / "out", scale=0.5)
    wl.transfer(base, tmp_path / "tuned", target, tmp_path / "whole", scale=0.5)
    found, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.allclose(tensor, whole[name], atol=1e-6) for name, tensor in found.items())
