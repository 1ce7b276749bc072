"""`weightlab lora` and `weightlab twin export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weightlab as wl
from tests.cli.conftest import Weightlab

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config)
    for name in ("base", "tuned", "more"):
        network.save_pretrained(name)
        for tensor in network.parameters():
            tensor.data.add_(0.05 * torch.randn_like(tensor))
    return tmp_path


def test_there_and_back(weightlab: Weightlab, models: Path) -> None:
    made = weightlab("lora", "extract", "base", "tuned", "-o", "adapter", "--rank", "2", "--json").json
    assert (
        made["rank"] == 2
        and 0 < made["residual"] < 1
        and {t["how"] for t in made["tensors"]} == {"factorised", "left out"}
    )
    ended = weightlab("lora", "import", "adapter", "base", "-o", "p.safetensors")
    assert ended.code == 0 and wl.open_patch("p.safetensors").records
    ended = weightlab("lora", "export", "p.safetensors", "base", "-o", "again")
    assert ended.code == 0 and "factors" in ended.out and "residual" in ended.out
    names = [Path(folder) / "adapter_model.safetensors" for folder in ("adapter", "again")]
    assert names[0].stat().st_size == names[1].stat().st_size
    assert weightlab("lora", "export", "p.safetensors", "base", "-o", "again").code == 4
    none = weightlab("lora", "extract", "base", "tuned", "-o", "x")
    assert none.code == 2 and "rank or energy" in none.err and not Path("x").exists()


def test_export_of_a_twin(weightlab: Weightlab, models: Path) -> None:
    assert weightlab("twin", "split", "base", "tuned", "more", "-o", "twin", "--compress", "low_rank:2").code == 0
    ended = weightlab("twin", "export", "twin", "-o", "served", "--rank", "4")
    assert ended.code == 0 and "served/shared: the shared model" in ended.out
    assert {p.name for p in Path("served").iterdir()} == {"shared", "tuned", "more"}
    told = weightlab("twin", "export", "twin", "-o", "vllm", "--vllm", "--rank", "4", "--json").json
    assert told["adapters"]["tuned"]["rank"] == 8 and told["adapters"]["tuned"]["residual"] > 0
