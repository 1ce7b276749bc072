"""No code of a model is run, and nobody is asked whether it may, unless the user said so beforehand."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from weightlab.errors import InputError, UnknownNetworkError
from weightlab.networks.made import needed_network, network_in
from weightlab.networks.tokenizers import tokenizer_in
from weightlab.networks.trust import trust_remote_code, trusting_remote_code
from weightlab.tensors.spec import TensorSpec

ROOT = Path(__file__).parents[2]
LOADING = ("from_pretrained", "from_config")
OURS = ("TwinModel", "PeftModel")  # these load no code
SPECS = {"layer.weight": TensorSpec("layer.weight", "F32", (4, 4))}


def faults(text: str) -> list[int]:
    """Lines with calls that load something of transformers and do not say whether its code may be run."""
    tree, wrong = ast.parse(text), []
    renamed = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Attribute)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and node.value.attr in LOADING
    }
    of_lm_eval = {
        call
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "HFLM" for b in node.bases)
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, last = name.rpartition(".")
            loads = last in LOADING and owner.rpartition(".")[2] not in OURS
            loads = loads or name in renamed or last in ("HFLM", "pipeline")
            if (loads or node in of_lm_eval) and not any(_says(keyword) for keyword in node.keywords):
                wrong.append(node.lineno)
    return wrong


def _says(keyword: ast.keyword) -> bool:
    if keyword.arg != "trust_remote_code":
        return False
    return not (isinstance(keyword.value, ast.Constant) and keyword.value.value is not False)


def sources() -> Iterator[Path]:
    for home in ("weightlab", "cli", "evals"):
        yield from sorted((ROOT / home).rglob("*.py"))


def test_every_call_of_transformers_says_whether_code_may_be_run() -> None:
    wrong = [f"{path.relative_to(ROOT)}:{line}" for path in sources() for line in faults(path.read_text("utf-8"))]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("AutoModel.from_pretrained(x)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=None)", False),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", True),
        ("AutoModel.from_config(x, trust_remote_code=trust_remote_code())", True),
        ("load: Any = AutoModel.from_pretrained\nload(x)", False),
        ("load = AutoModel.from_pretrained\nload(x, trust_remote_code=False)", True),
        ("HFLM(pretrained=x)", False),
        ("class A(HFLM):\n  def __init__(self): super().__init__(x)", False),
        ("class A(B):\n  def __init__(self): super().__init__(x)", True),
        ("wl.TwinModel.from_pretrained(x)", True),
        ("transformers.pipeline('fill-mask', x)", False),
    ],
)
def test_the_test_can_fail(text: str, right: bool) -> None:
    assert (faults(text) == []) is right


def evil(folder: Path, **config: object) -> Path:
    """A model with Python of its own, which leaves a file RAN behind."""
    folder.mkdir()
    (folder / "evil.py").write_text(
        f"open({str(folder / 'RAN')!r}, 'w').close()\n"
        "import torch\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
        "class EvilModel(PreTrainedModel):\n"
        "    config_class = Evil\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.layer = torch.nn.Linear(4, 4, bias=False)\n"
        "        self.post_init()\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
    )
    named = {"AutoConfig": "evil.Evil", "AutoModel": "evil.EvilModel"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "architectures": ["EvilModel"], "auto_map": named} | config)
    )
    save_file({"layer.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    return folder


CONFIGS: dict[str, dict[str, object]] = {
    "of its own kind": {},
    "of a known class": {"architectures": ["LlamaForCausalLM"]},
    "of a known kind": {"model_type": "llama"},
    "of a known kind and class": {"model_type": "bert", "architectures": ["BertModel"]},
    "in a part of it": {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "auto_map": None,
        "text_config": {"model_type": "t5_decoder", "auto_map": {"AutoModel": "evil.EvilModel"}},
        "vision_config": {"model_type": "clip_vision_model"},
    },
    "as a kernel on the Hub": {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "auto_map": None,
        "attn_implementation": "someone/kernel",
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_code_of_a_model_is_not_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    folder = evil(tmp_path / "m", **CONFIGS[kind])

    def no_question(*args: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", no_question)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    network = network_in(folder, SPECS)
    assert not (folder / "RAN").exists()
    if kind != "of a known kind and class":
        assert network is None
        with pytest.raises(UnknownNetworkError) as caught:
            needed_network(folder, SPECS)
        assert "--trust-remote-code" in caught.value.remedy


def test_code_is_run_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    folder = evil(tmp_path / "m")
    assert not trust_remote_code()
    with trusting_remote_code():
        assert trust_remote_code()
        network = needed_network(folder, SPECS)
    assert not trust_remote_code()
    assert (folder / "RAN").exists() and type(network).__name__ == "EvilModel"
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {"layer.weight": (4, 4)}
    assert all(p.is_meta for p in network.parameters())


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    folder = evil(tmp_path / "m")
    named = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": named}))
    (folder / "vocab.txt").write_text("a\nb\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    with pytest.raises(InputError) as caught:
        tokenizer_in(folder)
    assert "--trust-remote-code" in caught.value.remedy
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("trusting", [False, True])
def test_the_command_line_asks_nothing(tmp_path: Path, trusting: bool) -> None:
    pytest.importorskip("transformers")
    folder = evil(tmp_path / "m")
    wl.diff(
        str(folder), {"layer.weight": torch.full((4, 4), 2.0)}, str(tmp_path / "p.safetensors"), encode="low_rank:1"
    )
    words = ["lora", "export", str(tmp_path / "p.safetensors"), str(folder), "-o", str(tmp_path / "ad")]
    words += ["--trust-remote-code"] * trusting
    done = subprocess.run(
        [sys.executable, "-m", "weightlab_cli", *words],
        input="y\n" * 10,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert (folder / "RAN").exists() is trusting
    assert done.returncode == (0 if trusting else 3), done.stderr
    assert trusting or "--trust-remote-code" in done.stderr


def test_an_adapter_that_needs_the_network_says_why_there_is_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = evil(tmp_path / "m")
    save_file({"experts.a": torch.ones(4, 4), "experts.b": torch.ones(4, 4)}, folder / "model.safetensors")
    (tmp_path / "ad").mkdir()
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    parts = {f"base_model.model.experts.lora_{p}.weight": f for p, f in factors.items()}
    parts |= {f"base_model.model.experts.base_layer.lora_{p}.weight": f.clone() for p, f in factors.items()}
    save_file(parts, tmp_path / "ad" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.a", "experts.b"]}
    (tmp_path / "ad" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(wl.WeightlabError) as caught:
        wl.apply(folder, tmp_path / "ad", out=tmp_path / "out")
    assert "--trust-remote-code" in str(caught.value) and not (folder / "RAN").exists()
