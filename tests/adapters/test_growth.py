"""Adapters that make a model larger: more tokens, a head of its own; and what filters leave out of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, NamesMismatchError, StackError, UsageError, WeightlabError

HIDDEN, VOCABULARY = 8, 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj"


def model(folder: Path, *, tied: bool = False, nested: bool = False) -> dict[str, Tensor]:
    """A model with the names of a Llama."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {EMBEDDING: torch.randn(VOCABULARY, HIDDEN), f"{QUERY}.weight": torch.randn(HIDDEN, HIDDEN)}
    if not tied:
        tensors[HEAD] = torch.randn(VOCABULARY, HIDDEN)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "_name_or_path": "someone/base"}
    config = {"text_config": config, "_name_or_path": "someone/base"} if nested else config
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied, **config}))
    (folder / "tokenizer_config.json").write_text('{"of": "model"}')
    return tensors


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({f"base_model.model.{n}": t.clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": False, "task_type": "CAUSAL_LM"}
    settings["base_model_name_or_path"] = "someone/base"
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def factors() -> dict[str, Tensor]:
    return {f"{QUERY}.lora_A.weight": torch.ones(2, HIDDEN), f"{QUERY}.lora_B.weight": torch.ones(HIDDEN, 2)}


def longer(tensor: Tensor, rows: int = 3) -> Tensor:
    return torch.cat([tensor, torch.full((rows, HIDDEN), 0.25)])


@pytest.mark.parametrize("nested", [False, True])
def test_new_tokens_come_with_their_size_and_tokenizer(tmp_path: Path, nested: bool) -> None:
    base = model(tmp_path / "base", nested=nested)
    saved = {EMBEDDING: longer(base[EMBEDDING]), HEAD: longer(base[HEAD])}
    folder = adapter(tmp_path / "a", {**factors(), **saved}, modules_to_save=["embed_tokens", "lm_head"])
    (folder / "tokenizer_config.json").write_text('{"of": "adapter"}')
    (folder / "added_tokens.json").write_text('{"<new>": 16}')
    done = wl.apply(tmp_path / "base", folder, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[EMBEDDING], saved[EMBEDDING]) and torch.equal(found[HEAD], saved[HEAD])
    assert torch.allclose(found[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + 2, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["text_config"] if nested else config)["vocab_size"] == VOCABULARY + 3
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "adapter"}'
    assert (tmp_path / "out" / "added_tokens.json").exists()
    assert any("vocab_size is 19" in note for note in done.notes) and any("tokenizer" in note for note in done.notes)


def test_new_tokens_without_a_tokenizer_are_told(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    folder = adapter(tmp_path / "a", {EMBEDDING: longer(base[EMBEDDING])})
    done = wl.apply(tmp_path / "base", folder, out=tmp_path / "out")
    assert any("no tokenizer" in note for note in done.notes)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "model"}'


def test_trained_tokens_bring_their_tokenizer(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    folder = adapter(tmp_path / "a", {key: torch.full((2, HIDDEN), 0.5)}, trainable_token_indices=[3, 1])
    (folder / "tokenizer_config.json").write_text('{"of": "adapter"}')
    wl.apply(tmp_path / "base", folder, out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING]
    assert torch.allclose(found[[1, 3]], torch.tensor(0.5), rtol=0, atol=1e-6)
    assert torch.equal(found[4:], base[EMBEDDING][4:])
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "adapter"}'


def test_a_difference_that_appends_rows_tells_of_them_too(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    tuned = base | {EMBEDDING: longer(base[EMBEDDING])}
    patch = wl.diff(base, tuned, allow=["rows"])
    wl.apply(tmp_path / "base", patch, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == VOCABULARY + 3
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "model"}'
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 99}))
    done = wl.apply(tmp_path / "base", patch, out=tmp_path / "other")
    assert any("config.json is as it was" in note for note in done.notes)
    assert (tmp_path / "other" / "config.json").read_text() == config.read_text()


def test_one_end_alone_cannot_grow(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    folder = adapter(tmp_path / "a", {EMBEDDING: longer(base[EMBEDDING])})
    with pytest.raises(MisfitError, match="different numbers of rows") as caught:
        wl.apply(tmp_path / "base", folder, out=tmp_path / "out")
    assert set(caught.value.offenders) == {f"{EMBEDDING}: 19 rows", f"{HEAD}: 16 rows"}
    assert not (tmp_path / "out").exists()


def test_in_place_and_in_one_file_a_vocabulary_does_not_grow(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    folder = adapter(tmp_path / "a", {EMBEDDING: longer(base[EMBEDDING])})
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="one file") as caught:
        wl.apply(tmp_path / "base", folder, out=tmp_path / "out.safetensors")
    assert caught.value.remedy == "give a folder as --out"
    with pytest.raises(WeightlabError) as refused:
        wl.apply(tmp_path / "base", folder, in_place=True)
    assert "--out" in refused.value.remedy and refused.value.exit_code == 4
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_a_head_of_its_own_is_added_when_that_is_allowed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    head = torch.randn(3, HIDDEN).to(torch.bfloat16)
    folder = adapter(tmp_path / "a", {**factors(), "score.weight": head}, task_type="SEQ_CLS")
    with pytest.raises(NamesMismatchError, match=r"score\.weight \[3, 8\]") as caught:
        wl.apply(tmp_path / "base", folder, out=tmp_path / "out")
    assert "--allow added" in caught.value.remedy
    done = wl.apply(tmp_path / "base", folder, out=tmp_path / "out", allow=["added"])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {*base, "score.weight"}
    assert found["score.weight"].dtype == torch.bfloat16 and torch.equal(found["score.weight"], head)
    assert any("score.weight" in note for note in done.notes)
    with pytest.raises(UsageError, match="everything"):
        wl.apply(tmp_path / "base", folder, out=tmp_path / "no", allow=["everything"])
    result = wl.apply(base, folder, allow="added")
    assert torch.equal(result["score.weight"], head)


def test_factors_on_what_is_not_there_are_never_added(tmp_path: Path) -> None:
    model(tmp_path / "base")
    other = {"model.gone.lora_A.weight": torch.ones(2, HIDDEN), "model.gone.lora_B.weight": torch.ones(4, 2)}
    folder = adapter(tmp_path / "a", {**factors(), **other})
    with pytest.raises(NamesMismatchError, match=r"model\.gone\.weight: not in the model"):
        wl.apply(tmp_path / "base", folder, out=tmp_path / "out", allow=["added"])


def test_what_filters_leave_out_is_neither_needed_nor_checked(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    wrong = {"score.weight": torch.randn(3, HIDDEN), EMBEDDING: torch.randn(4, 4)}
    folder = adapter(tmp_path / "a", {**factors(), **wrong})
    choices: list[dict[str, Any]] = [
        {"include": ["*q_proj*"]},
        {"exclude": ["score*", "*embed*"]},
        {"exclude": ["score*", "*[dh]*ed*"]},
    ]
    for choice in choices:
        found: dict[str, Tensor] = wl.apply(base, folder, **choice)
        changed = {name for name, tensor in found.items() if not torch.equal(tensor, base[name])}
        assert found.keys() == base.keys() and changed == {f"{QUERY}.weight"}
    wl.apply(tmp_path / "base", folder, in_place=True, include="*q_proj*")
    with pytest.raises(StackError, match="on already"):
        wl.apply(tmp_path / "base", folder, in_place=True, include="*q_proj*")
    wl.remove(tmp_path / "base", folder)
    with pytest.raises(UsageError, match="match no tensor"):
        wl.apply(base, folder, include=["*typo*"])


def test_a_tied_copy_that_is_excluded_does_not_follow(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    both = base | {HEAD: base[EMBEDDING].clone()}
    folder = adapter(tmp_path / "a", {EMBEDDING: base[EMBEDDING] + 1})
    assert torch.equal(wl.apply(both, folder)[HEAD], base[EMBEDDING] + 1)
    kept = wl.apply(both, folder, exclude=[HEAD])
    assert torch.equal(kept[HEAD], base[EMBEDDING]) and torch.equal(kept[EMBEDDING], base[EMBEDDING] + 1)


def test_both_ends_of_a_tie_fit_when_they_are_equal(tmp_path: Path) -> None:
    values = torch.randn(VOCABULARY, HIDDEN)
    folder = tmp_path / "base"
    base = model(folder)
    shared = {EMBEDDING: values.clone(), f"{QUERY}.weight": base[f"{QUERY}.weight"]}
    tied = shared | {HEAD: shared[EMBEDDING]}  # one storage, two names
    equal = adapter(tmp_path / "equal", {EMBEDDING: values + 1, HEAD: values + 1})
    found = wl.apply(tied, equal)
    assert torch.equal(found[EMBEDDING], values + 1) and torch.equal(found[HEAD], values + 1)
    differ = adapter(tmp_path / "differ", {EMBEDDING: values + 1, HEAD: values + 2})
    with pytest.raises(NamesMismatchError, match="changed differently") as caught:
        wl.apply(tied, differ)
    assert any(EMBEDDING in line and HEAD in line for line in caught.value.offenders)


def test_renames_are_for_the_names_of_the_adapter(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    other = {name.replace("model.", "backbone.", 1): tensor for name, tensor in factors().items()}
    folder = adapter(tmp_path / "a", other)
    found = wl.apply(base, folder, renames={"backbone.": "model."})
    assert torch.allclose(found[f"{QUERY}.weight"], base[f"{QUERY}.weight"] + 2, atol=1e-6)
