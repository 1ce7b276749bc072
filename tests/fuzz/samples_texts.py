"""Tokenizers, plans, recipes, texts, and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import weightlab as wl
from tests.fuzz.kinds import kind
from tests.fuzz.mutations import of_bytes, of_json, of_lines, of_yaml
from tests.fuzz.samples_models import LLAMA, save_model
from weightlab.files.digest import bytes_digest
from weightlab.files.foreign import read_json_lines
from weightlab.networks.vocabulary import tokens_of
from weightlab.ops.recycle import Plan, read_plan

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat"]


def _tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "added_tokens.json").write_text(json.dumps({"dog": 7}))
    config = {"eos_token": "</s>", "model_max_length": 8, "added_tokens_decoder": {"7": {"content": "dog"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2], "pad_token_id": 0}))


@kind(
    "tokenizer",
    {
        "model/tokenizer.json": of_json,
        "model/added_tokens.json": of_json,
        "model/tokenizer_config.json": of_json,
        "model/special_tokens_map.json": of_json,
        "model/generation_config.json": of_json,
    },
    {
        "tokens": lambda d: tokens_of(d / "model"),
        "transfer to": lambda d: wl.transfer(d / "base", d / "tuned", d / "model", d / "out"),
        "transfer from": lambda d: wl.transfer(d / "base", d / "model", d / "tuned", d / "out"),
        "transfer base": lambda d: wl.transfer(d / "model", d / "base", d / "tuned", d / "out"),
    },
    share=6,
)
def _tokenizers(folder: Path) -> None:
    for seed, name in enumerate(("base", "tuned", "model")):
        _tokenizer(save_model(folder / name, seed), WORDS if name != "model" else [*WORDS[::-1], "new"])


@kind(
    "recycle plan",
    {"plan.yaml": of_yaml, "work/plan.json": of_json},
    {"read": lambda d: read_plan(d / "plan.yaml"), "dry run": lambda d: wl.recycle(d / "plan.yaml", dry_run=True)},
    share=4,
)
def _plan(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_model(folder / name, seed)
    plan = {"bases": ["one", "two"], "train": "python train.py {start} {out}", "work": "work", "result": "result"}
    (folder / "plan.yaml").write_text(json.dumps(plan))
    (folder / "work").mkdir()
    decisive = Plan.model_validate(plan).model_dump(exclude={"result", "work"})
    known = {"plan": bytes_digest(json.dumps(decisive, sort_keys=True).encode())[:16], "steps": ["1-tuned", "2-tuned"]}
    (folder / "work" / "plan.json").write_text(json.dumps(known))


def _recipe_of(path: Path) -> object:
    from weightlab_evals.recipes import read_recipe

    return read_recipe(path)


@kind("recipe", {"recipe.yaml": of_yaml}, {"read": lambda d: _recipe_of(d / "recipe.yaml")}, share=2)
def _recipe(folder: Path) -> None:
    import yaml

    manifests = Path(__file__).parents[2] / "manifests"
    recipe = yaml.safe_load(next(iter(sorted(manifests.rglob("*.yaml")))).read_text(encoding="utf-8"))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


@kind(
    "texts", {"texts.jsonl": of_lines}, {"read": lambda d: read_json_lines(d / "texts.jsonl", dict[str, str])}, share=1
)
def _texts(folder: Path) -> None:
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{word} é"}) for word in WORDS) + "\n")


@kind(
    "GGUF",
    {"model.gguf": of_bytes},
    {"inspect": lambda d: wl.inspect(d / "model.gguf"), "diff": lambda d: wl.diff(d / "model.gguf", d / "base")},
    share=1,
)
def _gguf(folder: Path) -> None:
    import gguf

    from tests.sources.test_gguf import write

    save_model(folder / "base")
    write(folder / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
