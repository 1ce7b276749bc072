"""Something else changes the files while patches are on: exit code 5, nothing is written, and how to go on is said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import overwrite, state
from weightlab.files.container import read_header

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shards(tensors: dict[str, torch.Tensor], cut: int) -> None:
    """Writes them to `model` in two shards, the first `cut` to the first."""
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:cut]}, f"model/{FIRST}")
    save_file({n: tensors[n] for n in names[cut:]}, f"model/{SECOND}")
    weight_map = {n: FIRST if i < cut else SECOND for i, n in enumerate(names)}
    Path("model", INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `model` in two shards, `clean`, `p` and `q`, which are on."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    shards(state(), 3)
    Path("model/config.json").write_text("{}")
    shutil.copytree("model", "clean")
    wl.diff("model", state(1, 0.01), "p.safetensors", include=["embed*", "layers.1*"])
    wl.diff("model", state(2, 0.01), "q.safetensors", encode="dense", include=["layers.1*"])
    wl.diff("model", state(3, 0.01), "r.safetensors", encode="dense")
    wl.apply("model", ["p.safetensors", "q.safetensors@0.5"], in_place=True)
    return tmp_path


def flip(tensor: str, file: str) -> None:
    entry = read_header(Path("model", file)).entries[tensor]
    where = entry.offset + entry.nbytes // 2
    overwrite(Path("model", file), where, bytes([Path("model", file).read_bytes()[where] ^ 1]))


def saved_in_other_shards() -> None:
    shards(state(5, 1.0), 1)


def saved_as_one_file() -> None:
    for file in (FIRST, SECOND, INDEX):
        Path("model", file).unlink()
    save_file(state(5, 1.0), "model/model.safetensors")


def saved_as_a_pickle() -> None:
    for file in (FIRST, SECOND, INDEX):
        Path("model", file).unlink()
    torch.save(state(5, 1.0), "model/pytorch_model.bin")


def other_metadata() -> None:
    """The same tensors at the same places in a header that another program wrote."""
    save_file(load_file(f"model/{FIRST}"), f"model/{FIRST}", metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "a bit of one tensor": (lambda: flip("layers.1.conv", SECOND), ["layers.1.conv: changed"]),
    "a bit of two": (
        lambda: (flip("layers.1.conv", SECOND), flip("embed.weight", FIRST)),
        ["embed.weight: changed", "layers.1.conv: changed"],
    ),
    "the values of a shard": (
        lambda: save_file({n: t + 1 for n, t in load_file(f"model/{FIRST}").items()}, f"model/{FIRST}"),
        ["embed.weight: changed"],
    ),
    "a header": (other_metadata, [f"{FIRST}: not the file that was patched"]),
    "other shards": (
        saved_in_other_shards,
        [f"{FIRST}: not the file that was patched", f"{SECOND}: not the file that was patched"],
    ),
    "one file instead of shards": (saved_as_one_file, [f"{INDEX}: not there any more"]),
    "a pickle instead of shards": (saved_as_a_pickle, [f"{INDEX}: not there any more"]),
    "a shard is gone": (lambda: Path("model", SECOND).unlink(), [SECOND]),
    "a shard is cut off": (lambda: os.truncate(Path("model", SECOND), 999), [SECOND]),
    "all is gone but the configuration": (
        lambda: [Path("model", f).unlink() for f in (FIRST, SECOND, INDEX)],
        [f"{INDEX}: not there any more"],
    ),
    "the index is gone": (lambda: Path("model", INDEX).unlink(), [f"{INDEX}: not there any more"]),
}
COMMANDS = [
    ("remove", "model", "p.safetensors"),
    ("remove", "model", "--all"),
    ("remove", "model", "--all", "--dry-run"),
    ("scale", "model", "q.safetensors", "2"),
    ("apply", "model", "r.safetensors", "--in-place"),
]


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_is_written(weightlab: Weightlab, place: Path, what: str) -> None:
    change, named = CHANGES[what]
    before = content(place)
    change()
    changed = content(place)
    assert changed != before
    for words in COMMANDS:
        ended = weightlab(*words)
        assert ended.code == 5, (words, ended.err)
        assert "something else changed it while patches were on" in ended.err.splitlines()[0]
        assert "weightlab remove model --forget" in ended.err.splitlines()[-1]
        for text in named:
            assert text in ended.err, ended.err
    ended = weightlab("status", "model")
    assert ended.code == 5 and "q.safetensors" in ended.out and "--forget" in ended.out
    for text in named:
        assert text in ended.out
    told = weightlab("status", "model", "--json").json
    assert not told["intact"] and len(told["patches"]) == 2 and told["tensors"] == 2 and told["kept_bytes"] > 2000
    for words in (("apply", "model", "r.safetensors", "-o", "new"), ("verify", "model")):
        assert weightlab(*words).code in (3, 5)
    assert content(place) == changed


@pytest.mark.parametrize("what", CHANGES)
def test_forget_leaves_the_files(weightlab: Weightlab, place: Path, what: str) -> None:
    CHANGES[what][0]()
    before = content(place)
    assert weightlab("remove", "model", "--forget").code == 0
    assert content(place) == {n: d for n, d in before.items() if ".weightlab" not in n}
    ended = weightlab("status", "model")
    if "gone" in what or "cut off" in what:
        assert ended.code == 3
    else:
        assert ended.code == 0 and ended.out == "model: no patch is on\n"
    if "pickle" not in what and ended.code == 0:
        assert weightlab("apply", "model", "r.safetensors", "--in-place").code == 0
        assert weightlab("remove", "model", "--all").code == 0
        assert content(place) == {n: d for n, d in before.items() if ".weightlab" not in n}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_other_files_may_change(weightlab: Weightlab, place: Path, name: str) -> None:
    text = json.dumps({"temperature": 0.7})
    if name == INDEX:
        text = json.dumps(json.loads(Path("model", INDEX).read_text()) | {"metadata": {"total_size": 1}})
    Path("model", name).write_text(text)
    assert weightlab("status", "model").code == 0
    assert weightlab("scale", "model", "q.safetensors", "2").code == 0
    assert weightlab("remove", "model", "--all").code == 0
    found, first = content(place / "model"), content(place / "clean")
    assert {n: d for n, d in found.items() if n != name} == {n: d for n, d in first.items() if n != name}
    assert Path("model", name).read_text() == text


def test_a_configuration_that_allows_no_sums_any_more(weightlab: Weightlab, place: Path) -> None:
    """What is on can still come off."""
    Path("model/config.json").write_text('{"quantization_config": {"quant_method": "another"}}')
    before = content(place)
    assert weightlab("scale", "model", "q.safetensors", "2").code == 4
    assert content(place) == before
    assert weightlab("remove", "model", "--all").code == 0
    Path("model/config.json").write_text("{}")
    assert content(place / "model") == content(place / "clean")


def test_a_single_file_that_is_gone(weightlab: Weightlab, place: Path) -> None:
    save_file(state(), "one.safetensors")
    assert weightlab("apply", "one.safetensors", "r.safetensors", "--in-place").code == 0
    Path("one.safetensors").unlink()
    before = content(place)
    for words in (("remove", "--all"), ("scale", "r.safetensors", "2"), ("apply", "p.safetensors", "--in-place")):
        ended = weightlab(words[0], "one.safetensors", *words[1:])
        assert ended.code == 5 and "one.safetensors: not there any more" in ended.err and "--forget" in ended.err
    ended = weightlab("status", "one.safetensors")
    assert ended.code == 5 and "r.safetensors" in ended.out
    assert content(place) == before
    assert weightlab("remove", "one.safetensors", "--forget").code == 0
    assert not Path(".weightlab").exists()


def test_save_pretrained_over_it(weightlab: Weightlab, place: Path) -> None:
    """What a training script does: load the patched model, change it, save it to where it came from."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=12, **size)).save_pretrained("bert")
    base = load_file("bert/model.safetensors")
    wl.diff("bert", {n: t + 0.125 for n, t in base.items()}, "b.safetensors", encode="dense:bf16")
    first = content(place / "bert")
    assert weightlab("apply", "bert", "b.safetensors", "--in-place").code == 0
    patched = content(place / "bert")

    model = BertModel.from_pretrained("bert")
    model.save_pretrained("bert")  # nothing was changed: the same bytes, which weightlab takes for its own
    assert content(place / "bert") == patched
    assert weightlab("status", "bert").code == 0

    with torch.no_grad():
        model.get_parameter("encoder.layer.1.output.dense.bias").add_(1.0)
    model.save_pretrained("bert")
    saved = content(place / "bert")
    for words in (("remove", "bert", "--all"), ("scale", "bert", "b.safetensors", "2"), ("status", "bert")):
        ended = weightlab(*words)
        assert ended.code == 5
        assert "encoder.layer.1.output.dense.bias: changed" in ended.out + ended.err
        assert "encoder.layer.0" not in ended.out + ended.err
    model.save_pretrained("bert", max_shard_size="4KB")  # shards and an index, beside the one file
    assert content(place / "bert") != saved and Path("bert", INDEX).is_file()
    assert "patches are on model.safetensors beside it" in weightlab("status", "bert").out
    Path("bert/model.safetensors").unlink()
    resharded = content(place / "bert")
    assert weightlab("remove", "bert", "--all").code == 5
    assert weightlab("apply", "bert", "b.safetensors", "--in-place").code == 5
    assert content(place / "bert") == resharded
    assert weightlab("remove", "bert", "--forget").code == 0
    assert content(place / "bert") == {n: d for n, d in resharded.items() if ".weightlab" not in n}
    again = content(place / "bert")
    assert weightlab("apply", "bert", "b.safetensors", "--in-place").code == 0
    assert weightlab("remove", "bert", "b.safetensors").code == 0
    assert content(place / "bert") == again != first
