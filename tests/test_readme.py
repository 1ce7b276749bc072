"""What the README shows is run: the demo's transcript, every command line, every line of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from weightlab_cli.main import COMMANDS, run
from weightlab_evals.networks import vgg

import weightlab as wl
from tests.conftest import CACHE, ROOT, unpacked
from tests.evals.images.machine import NAMES
from tests.patches.tools import state

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The contents of the README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> Iterator[str]:
    """The lines of the README's shell blocks that call weightlab."""
    for block in blocks("sh"):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line for line in lines if line.startswith("weightlab "))


def plain(text: str) -> list[str]:
    """Lines without what may differ between machines: ids of patches that an SVD went into, and seconds."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "<id>", text)
    text = re.sub(r"Done in \d+ seconds", "Done in <n> seconds", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `base`; `tuned`, `robust` and `next`, trained from it; a small classifier and its patch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTLAB_CACHE", str(tmp_path / "cache"))
    network = vgg().state_dict()
    save_file(network, tmp_path / "cnn.safetensors")
    wl.diff(network, {n: t + 0.01 for n, t in network.items()}, tmp_path / "fog.safetensors", encode="dense")
    (tmp_path / "plan.yaml").write_text(
        "{bases: [base, next], train: 'tune {start} {out}', work: work, result: result}"
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    factors = {"layers.0.lora_A.weight": torch.ones(1, 40), "layers.0.lora_B.weight": torch.ones(16, 1)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    for name, seed in (("base", 0), ("tuned", 1), ("robust", 2), ("next", 3)):
        (tmp_path / name).mkdir()
        save_file(
            state(seed, 0.01 * seed) | {"layer.norm.weight": torch.full((8,), 1.0 + seed)},
            tmp_path / name / "model.safetensors",
        )
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def test_transcript_is_what_the_demo_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unpacked("chgnet==0.4.2")  # and so the wheel is in the cache
    assert run(["demo", "--data", str(CACHE), "--picture", str(tmp_path / "picture.png")]) == 0
    printed = iter(plain(capsys.readouterr().out))
    (transcript,) = blocks("console")
    shown = [line for line in plain(transcript) if line != "…"]
    missing = [line for line in shown if line not in printed]  # each is looked for after the one before
    assert len(shown) > 20 and missing[:1] == []


def test_command_lines_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(command_lines())
    for line in lines:
        if line.startswith("weightlab eval images") and not NAMES:
            continue  # this machine cannot corrupt images (see tests/evals/images/machine.py)
        # gsm8k is on the Hub; tests/evals/lm scores local tasks
        more = ["--dry-run"] if line.startswith("weightlab eval lm") else []
        code = run([*shlex.split(line, comments=True)[1:], *more])
        assert code == 0, f"{line}\n{capsys.readouterr().err}"
    used = {line.split()[1] for line in lines}
    assert used == set(COMMANDS.names()) - {"demo"}  # a command that the README does not show is not found
    assert not (place / "base" / ".weightlab").exists()


def test_python_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "base", "tuned", "-o", "change.safetensors"]) == 0
    state_dict = load_file(place / "base" / "model.safetensors")
    module = module_of(state_dict)
    first = {n: t.clone() for n, t in module.state_dict().items()}
    names: dict[str, object] = {"state_dict": state_dict, "module": module}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("\n") > 1
    assert all(torch.equal(t, first[n]) for n, t in module.state_dict().items())
    assert not (place / "model" / ".weightlab").exists()


def module_of(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict has these names and tensors."""
    module = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        owner = module
        for word in path:
            if not hasattr(owner, word):
                owner.add_module(word, nn.Module())
            owner = getattr(owner, word)
        owner.register_buffer(last, tensor.clone())
    return module


def test_links_and_files_of_the_readme_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
