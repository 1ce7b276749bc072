"""`weightlab signature`, `compare` and `identify`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Weightlab
from tests.networks.test_names import vision
from tests.patches.tools import state


@pytest.fixture
def trained(place: Path) -> Path:
    """The current folder, with `noisy.safetensors` and `blurred.safetensors` trained from `base` beside `tuned`."""
    save_file(state(3, 0.02), place / "noisy.safetensors")
    save_file(state(4, 0.02), place / "blurred.safetensors")
    return place


def test_signatures_from_the_command_line(weightlab: Weightlab, trained: Path) -> None:
    made = weightlab(
        "signature", "base", "tuned", "noisy.safetensors", "-o", "noise.safetensors", "--layers", "first:2"
    )
    assert made.code == 0 and "layers.0" in made.out and "embed" not in made.out
    words = ("--norm", "keep", "--project", "layer", "--encode", "quantized:4", "--json")
    made = weightlab("signature", "base", "tuned", "blurred.safetensors", "-o", "blur.safetensors", *words)
    assert made.json["kind"] == "signature" and made.json["method"]["parameters"]["project"] == "layer"
    assert weightlab("apply", "tuned", "noise.safetensors", "blur.safetensors@0.5", "--in-place").code == 0
    assert weightlab("remove", "tuned", "--all").code == 0
    alike = weightlab("compare", "noise.safetensors", "blur.safetensors", "--plot", "alike.png")
    assert alike.code == 0 and "share of 2" in alike.out and (trained / "alike.png").exists()
    found = weightlab("identify", "noise.safetensors", "blur.safetensors", "noise.safetensors", "--json").json
    assert [m["label"] for m in found["matches"]] == ["noise.safetensors", "blur.safetensors"]


def test_errors_come_before_anything_is_written(weightlab: Weightlab, trained: Path) -> None:
    before = sorted(p.name for p in trained.iterdir())
    for words, code in (
        (("--layers", "first:9"), 2),
        (("--layers", "nowhere*"), 2),
        (("--norm", "robust"), 2),
        (("--encode", "exact"), 2),
        (("--model", "json:loads"), 2),
        (("--model", "nowhere:build"), 2),
        (("--order", "embed", "--order", "nix"), 2),
    ):
        ended = weightlab("signature", "base", "tuned", "noisy.safetensors", "-o", "p.safetensors", *words)
        assert ended.code == code and ended.err.startswith("error: "), words
    save_file({"other": torch.zeros(3)}, trained / "other.safetensors")
    ended = weightlab("signature", "base", "tuned", "other.safetensors", "-o", "p.safetensors")
    assert ended.code == 4 and ended.err.count("missing") == 5
    after = {p.name for p in trained.iterdir()} - {"__pycache__"}
    assert after == {*before, "other.safetensors"}


def test_the_order_of_a_network_that_a_function_makes(
    weightlab: Weightlab, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "made_here.py").write_text(
        "from torch import nn\n\n\ndef network():\n"
        "    module = nn.Module()\n"
        "    module.layers = nn.ModuleList([nn.Linear(40, 16), nn.Module()])\n"
        "    module.layers[1].register_buffer('conv', module.layers[0].weight.new_zeros(8, 4, 3, 3))\n"
        "    module.embed = nn.Embedding(24, 16)\n"
        "    return module\n"
    )
    monkeypatch.syspath_prepend(str(trained))
    words = ("signature", "base", "tuned", "noisy.safetensors", "--layers", "first:1", "--json")
    known = weightlab(*words, "-o", "known.safetensors", "--model", "made_here:network").json
    assert known["method"]["parameters"] | {"order": "modules"} == known["method"]["parameters"]
    assert known["method"]["parameters"]["layers"] == ["layers.0"]
    said = weightlab(*words, "-o", "said.safetensors", "--order", "embed", "--order", "layers.1").json
    assert said["method"]["parameters"]["layers"] == ["embed"]
    assert said["method"]["parameters"]["order"] == "given"


def test_dry_runs_write_nothing(weightlab: Weightlab, trained: Path) -> None:
    dry = weightlab("signature", "base", "tuned", "noisy.safetensors", "-o", "p.safetensors", "--dry-run", "--json")
    assert dry.json["dry_run"] and not (trained / "p.safetensors").exists()
    assert weightlab("compare", "base", "tuned", "--dry-run", "--json").json["read"][0]["tensors"] == 6
    assert weightlab("compare", "base", "tuned", "noisy.safetensors", "--base", "base", "--json").json["tensors"] == 5


def test_layers_of_a_transformer_are_embeddings_and_blocks(weightlab: Weightlab, tmp_path: Path) -> None:
    for seed, name in enumerate(("pretrained", "clean", "noisy")):
        torch.manual_seed(seed)
        vision("vit")().save_pretrained(tmp_path / name)
    places = [tmp_path / name for name in ("pretrained", "clean", "noisy")]
    made = weightlab("signature", *places, "-o", tmp_path / "p.safetensors", "--layers", "first:2", "--json").json
    assert made["method"]["parameters"]["layers"] == ["stem", "vit.encoder.layer.0"]
    assert made["method"]["parameters"]["order"] == "modules"
    assert weightlab("signature", *places, "-o", tmp_path / "q.safetensors", "--layers", "first:4").code == 2
    made = weightlab("signature", *places, "-o", tmp_path / "q.safetensors", "--layers", "classifier", "--json").json
    assert made["tensors"] == 1  # its bias is zero in all three
