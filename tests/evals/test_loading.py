"""Networks that evaluations load from a stranger's folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weightlab_evals.images.models import open_classifier
from weightlab_evals.lm.barrier import text_loss
from weightlab_evals.loading import looked_at

from tests.networks.test_trust import evil
from weightlab.errors import InputError, UnknownNetworkError

transformers: Any = pytest.importorskip("transformers", reason="transformers is in an extra")


def test_what_is_made_is_counted(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownNetworkError, match="more than"), looked_at(tmp_path):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10_000)))


@pytest.mark.parametrize("load", [open_classifier, lambda folder: text_loss(folder, Path(folder) / "text.txt")])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 10**9},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 60_000},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 60_000},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_labels": 10**10},
    ],
)
def test_networks_that_the_weights_cannot_be_of(tmp_path: Path, load: Any, config: dict[str, Any]) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("a b c")
    with pytest.raises((InputError, UnknownNetworkError)):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [open_classifier, lambda folder: text_loss(folder, Path(folder) / "text.txt")])
def test_code_of_a_model_is_not_run(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.EvilModel"}
    folder = evil(tmp_path / "m", auto_map=named | {"AutoModelForCausalLM": "evil.EvilModel"})
    (folder / "text.txt").write_text("a b c")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises((InputError, UnknownNetworkError)) as caught:
        load(str(folder))
    assert "--trust-remote-code" in caught.value.remedy and not (folder / "RAN").exists()
