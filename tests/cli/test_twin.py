"""`weightlab twin`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.patches.tools import state

SPLIT = ("twin", "split", "base", "tuned", "more=other.safetensors", "-o", "twin")


def test_split(weightlab: Weightlab, place: Path) -> None:
    dry = weightlab(*SPLIT, "--dry-run", "--json").json
    assert dry["dry_run"] and not (place / "twin").exists()
    made = weightlab(*SPLIT, "--json").json
    assert [e["name"] for e in made["experts"]] == ["tuned", "more"] and made["method"]["lambda"] == 0.3
    assert dry["bytes"] == made["bytes"] == made["shared"]["bytes"] + sum(e["bytes"] for e in made["experts"])
    assert made["full_bytes"] == 2 * wl.inspect("base").bytes
    again = weightlab(*SPLIT)
    assert again.code == 4 and "exists already" in again.err
    words = ("--method", "ties", "--set", "density=0.5,0.2", "--set", "weight=0.5,2", "--compress", "random:0.3")
    ended = weightlab(*SPLIT[:-1], "ties", *words)
    assert ended.code == 0 and "2 full copies" in ended.out and "of a model" in ended.out
    header = wl.open_twin(Path("ties")).header
    assert header.method["name"] == "ties" and sorted(e["weight"] for e in header.method["experts"]) == [0.5, 2.0]
    assert header.compress == "sparse:0.3:random"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("twin", "split", "base", "tuned", "-o", "t"), 2, "two experts or more"),
        (("twin", "split", "base", "tuned", "a=tuned", "b=nowhere", "-o", "t"), 3, "nowhere"),
        ((*SPLIT[:-1], "t", "--method", "tie"), 2, "did you mean 'ties'"),
        ((*SPLIT[:-1], "t", "--set", "weight=1,x"), 2, "no number"),
        ((*SPLIT[:-1], "t", "--set", "density"), 2, "NAME=VALUE"),
        (("twin", "route", "base", "--data", "a=b"), 3, "no twin"),
        (("twin", "nothing"), 2, "nothing"),
    ],
)
def test_what_makes_no_sense(weightlab: Weightlab, place: Path, words: tuple[str, ...], code: int, said: str) -> None:
    ended = weightlab(*words)
    assert ended.code == code and said in ended.err and not (place / "t").exists()


def test_route(weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")
    tokenizers: Any = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", *(f"a{n}" for n in range(20)), *(f"b{n}" for n in range(20))]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config)
    for name in ("base", "first", "second"):
        for tensor in network.parameters():
            tensor.data.add_(0.05 * torch.randn_like(tensor))
        network.save_pretrained(name)
        tokenizer.save_pretrained(name)
    assert weightlab("twin", "split", "base", "first", "second", "-o", "twin", "--compress", "low_rank:2").code == 0
    generator = torch.Generator().manual_seed(0)
    for kind in "ab":
        lines = [
            " ".join(f"{kind}{n}" for n in torch.randint(3, (5,), generator=generator).tolist()) for _ in range(40)
        ]
        Path(f"{kind}.txt").write_text("\n".join(lines))
        Path(f"{kind}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
        with Path(f"{kind}.jsonl").open("a", encoding="utf-8") as file:  # a line of text may have a line separator
            file.write("\n" + json.dumps({"text": f"{kind}0\u2028{kind}1"}, ensure_ascii=False) + "\n")
    data = ("--data", "first=a.txt", "--data", "second=b.jsonl")
    dry = weightlab("twin", "route", "twin", *data, "--router", "nearest", "--dry-run", "--json")
    assert dry.code == 0 and not Path("twin/router.json").exists()
    ended = weightlab("twin", "route", "twin", *data, "--router", "nearest")
    assert ended.code == 0 and "100.0% of 16 texts" in ended.out and "largest weight" in ended.out
    assert wl.TwinModel.from_pretrained("twin").router is not None
    wrong = weightlab("twin", "route", "twin", "--data", "first=a.txt")
    assert wrong.code == 2 and "second: no data" in wrong.err
    Path("c.jsonl").write_text('{"words": 1}')
    broken = weightlab("twin", "route", "twin", "--data", "first=c.jsonl", "--data", "second=b.txt")
    assert broken.code == 3 and "c.jsonl" in broken.err
    for path in Path("twin").glob("token*"):
        path.unlink()
    mute = weightlab("twin", "route", "twin", *data)
    assert mute.code == 3 and "no tokenizer" in mute.err


def test_a_patch_and_an_expert_of_another_shape(weightlab: Weightlab, patches: Path) -> None:
    other = {**state(3, 0.1)}
    name = next(n for n, t in other.items() if t.ndim == 2)
    other[name] = other[name][:-1].contiguous()
    save_file(other, patches / "narrow.safetensors")
    ended = weightlab("twin", "split", "base", "dense.safetensors", "narrow.safetensors", "-o", "t", "--json")
    assert ended.code == 0
    assert all(name in expert["heads"] for expert in ended.json["experts"])
