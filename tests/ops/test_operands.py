"""How models and patches are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.ops.test_apply_out import state
from weightlab.errors import MissingInputError, UnknownNetworkError, UsageError
from weightlab.networks.made import NetworkOf
from weightlab.ops.operands import (
    _saying_why,
    adapter_at,
    adapters_beside,
    is_only_adapter,
    label_of,
    model_path,
    names_patch,
    open_patches,
    parse_patch,
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("p.safetensors", "p@2.safetensors", "odd@0.5"):
        wl.diff(state(), state(1, 0.1), "x.safetensors")
        Path("x.safetensors").rename(name)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("p.safetensors", "p.safetensors", None),
        ("p.safetensors@0.5", "p.safetensors", 0.5),
        ("p.safetensors@-1", "p.safetensors", -1.0),
        ("p.safetensors@1e-3", "p.safetensors", 1e-3),
        ("p@2.safetensors", "p@2.safetensors", None),
        ("p@2.safetensors@3", "p@2.safetensors", 3.0),
        ("odd@0.5", "odd@0.5", None),  # a path that exists wins as a whole
        ("odd@0.5@2", "odd@0.5", 2.0),
        ("p.safetensors@nan", "p.safetensors@nan", None),
        ("p.safetensors@inf", "p.safetensors@inf", None),
        ("p.safetensors@", "p.safetensors@", None),
        ("@0.5", "@0.5", None),
        ("hf://o/n@main@0.5", "hf://o/n@main", 0.5),
        ("hf://o/n@0.5@1", "hf://o/n@0.5", 1.0),
    ],
)
def test_the_grammar(place: Path, text: str, path: str, scale: float | None) -> None:
    assert parse_patch(text) == (path, scale)


def test_a_revision_that_could_be_a_scale() -> None:
    with pytest.raises(UsageError, match="revision or a scale") as failed:
        parse_patch("hf://o/n@0.5")
    assert "hf://o/n@main@0.5" in failed.value.remedy and "hf://o/n@0.5@1" in failed.value.remedy


def test_scales_reach_the_patch_and_its_label_is_the_file(place: Path) -> None:
    (opened,) = open_patches("p.safetensors@-0.5")
    assert opened.scale == -0.5 and label_of("p.safetensors@-0.5", opened) == "p.safetensors"
    assert [p.scale for p in open_patches(["p.safetensors", opened * 2, Path("odd@0.5")])] == [1.0, -1.0, 1.0]


def test_what_is_not_there_says_what_to_do(place: Path) -> None:
    for model, hint in (
        ("org/name", "hf download org/name"),
        ("hf://org/name@v2/x.bin", "hf download org/name x.bin --revision v2"),
    ):
        with pytest.raises(MissingInputError) as failed:
            wl.apply(model, "p.safetensors", out="out")
        assert hint in failed.value.remedy
    for patch in ("hf://org/name", "nowhere.safetensors", "p.safetensors@nan"):
        with pytest.raises(MissingInputError):
            wl.apply(state(), patch)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_paths_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for call in (model_path, open_patches):
        with pytest.raises(MissingInputError) as failed:
            call(f"{tmp_path}/{name}")
        assert failed.value.exit_code == 3 and failed.value.message.isprintable()


@pytest.mark.parametrize("known", [True, False])
def test_why_the_network_is_not_known_is_said_with_what_it_led_to(known: bool) -> None:
    network = NetworkOf("nowhere", {})
    network.why = None if known else UnknownNetworkError("no such class", "update transformers")
    with pytest.raises(MissingInputError) as failed, _saying_why(network):
        raise MissingInputError("not clear", "say it", ["a", "b"])
    assert failed.value.message == "not clear" and failed.value.offenders == ("a", "b")
    assert failed.value.remedy == (
        "say it" if known else "say it; the network is not known: no such class (update transformers)"
    )


def test_what_a_folder_is(place: Path) -> None:
    """A patch, an adapter, a model, or a model with an adapter beside it, which is left aside and told."""
    for folder, files in (("adapter", []), ("model", ["config.json"]), ("both", ["config.json"])):
        Path(folder).mkdir()
        for file in files:
            Path(folder, file).write_text("{}")
        if folder != "adapter":
            save_file(state(), Path(folder, "model.safetensors"))
        if folder != "model":
            Path(folder, "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["a"]}')
            save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, Path(folder, "adapter_model.safetensors"))
    everything = ["p.safetensors", "adapter", "model", "both"]
    assert [names_patch(name) for name in everything] == [True, True, False, False]
    assert [is_only_adapter(Path(name)) for name in everything] == [False, True, False, False]
    assert [adapter_at(name) for name in everything] == [None, Path("adapter"), None, Path("both")]
    assert adapters_beside(*everything, state()) == ["both: the adapter that lies beside the model is left aside"]
    (opened,) = open_patches("p.safetensors")
    assert names_patch(opened) and adapter_at(opened) is None and not names_patch("nowhere")
    assert label_of(opened, opened) == "p.safetensors"
