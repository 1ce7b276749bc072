"""Adapters on the command line: heads of their own, the order of experts, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.cli.conftest import Weightlab


def adapter(folder: Path, tensors: dict[str, Tensor], **config: object) -> None:
    folder.mkdir()
    save_file({f"base_model.model.{n}": t.clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "someone/other-model"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))


def test_a_head_that_the_model_lacks(weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"layer.weight": torch.ones(4, 6)}, "model.safetensors")
    factors = {"layer.lora_A.weight": torch.ones(2, 6), "layer.lora_B.weight": torch.ones(4, 2)}
    adapter(Path("adapter"), {**factors, "score.weight": torch.full((3, 4), 2.0)}, task_type="SEQ_CLS")
    ended = weightlab("apply", "model.safetensors", "adapter", "-o", "out.safetensors")
    assert ended.code == 4 and "score.weight [3, 4]" in ended.err and "--allow added" in ended.err
    assert not Path("out.safetensors").exists()
    told = weightlab(
        "apply", "model.safetensors", "adapter", "-o", "out.safetensors", "--allow", "added", "--json"
    ).json
    assert any("score.weight" in note for note in told["notes"])
    assert any("trained on someone/other-model" in note for note in told["notes"])
    found = load_file("out.safetensors")
    assert torch.equal(found["score.weight"], torch.full((3, 4), 2.0))
    assert torch.equal(found["layer.weight"], torch.full((4, 6), 3.0))
    left = weightlab("apply", "model.safetensors", "adapter", "-o", "one.safetensors", "--exclude", "score.*")
    assert left.code == 0 and load_file("one.safetensors").keys() == {"layer.weight"}


def test_the_order_of_experts(weightlab: Weightlab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    down, up = torch.randn(2, 2, 4), torch.randn(2, 3, 2)  # two experts of rank 2
    packed = {"experts.lora_A.weight": down.reshape(4, 4), "experts.lora_B.weight": up.permute(1, 0, 2).reshape(3, 4)}
    adapter(Path("adapter"), packed, target_parameters=["experts.down"], unsloth_fixed=True)
    save_file({"experts.down": torch.zeros(2, 3, 4)}, "model.safetensors")
    ended = weightlab("apply", "model.safetensors", "adapter", "-o", "out.safetensors")
    assert ended.code == 2 and "--experts-layout unsloth" in ended.err
    for verb in (("apply", "model.safetensors", "adapter"), ("lora", "import", "adapter", "model.safetensors")):
        ended = weightlab(*verb, "-o", f"{verb[0]}.safetensors", "--experts-layout", "unsloth")
        assert ended.code == 0, ended.err
    again = weightlab("apply", "model.safetensors", "lora.safetensors", "-o", "again.safetensors")
    assert again.code == 0
    for name in ("apply.safetensors", "again.safetensors"):
        assert torch.allclose(load_file(name)["experts.down"], up @ down, rtol=0, atol=1e-6)
