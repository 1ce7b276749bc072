"""Patterns of module names, beside peft's own way of looking them up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from weightlab.adapters import patterns
from weightlab.adapters.patterns import Patterns, matched
from weightlab.errors import MalformedFileError

NAMES = (
    *("q_proj", "layers.0.q_proj", "layers.1.q_proj", "layers.10.q_proj", "model.layers.1.mlp.up_proj", "xlayers.1.q"),
    *("layers_1.q_proj", "model.vision.layers.0.q_proj", "lm_head", "a.b", "aXb", "x.aXb", "", "a."),
)
SETS = (
    ["q_proj"],
    ["layers.1.q_proj", "q_proj"],
    ["q_proj", "layers.1.q_proj"],
    ["layers.1.q_proj", "a.b", "lm_head"],
    [r"layers\.\d+\.q_proj", "q_proj"],
    [r".*vision.*\.q_proj", r"layers\.[01]\..*"],
    ["up_proj|q_proj", "lm_.*"],
    [r"^layers\.(0|1)\.q_proj", r"model\.(?!vision).*"],
    [r"(?=.*1).*q_proj"],
    ["", "(q|k)_proj"],
    ["a.b", "aXb"],
    ["a)|(b", "q_proj"],
    [r"(layers\.)?1\.q_proj"],
    ["[[q]_proj"],
)


@pytest.mark.parametrize("keys", SETS)
def test_the_first_pattern_that_fits_is_the_one_that_peft_takes(keys: list[str]) -> None:
    other = pytest.importorskip("peft.utils.other")
    found = Patterns(keys, "here")
    for name in NAMES:
        mine = found.owner_of(name)
        assert (name if mine is None else mine) == other.get_pattern_key(keys, name), (keys, name)


@pytest.mark.parametrize("text", [r".*\.q_proj", "q_proj", "a.b", r"model\.(?!vision).*", ".*", "layers.1.q_proj|a."])
def test_a_whole_name_fits_as_it_does_for_peft(text: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    found = Patterns([text], "here", whole=True)
    for name in NAMES:
        assert (found.owner_of(name) == text) == bool(other.match_target_against_key(text, name)), (text, name)


def test_all_that_are_no_patterns_are_listed() -> None:
    long = ".*" * patterns.MAX_LENGTH
    with pytest.raises(MalformedFileError) as caught:
        Patterns(["q_proj", "(", "*", "[a", long, "(?<=a*)b", "(" * 5000 + ")" * 5000], "c.json: alpha_pattern")
    assert "c.json: alpha_pattern" in str(caught.value)
    assert [o.split("'")[1] for o in caught.value.offenders[:3]] == ["(", "*", "[a"]
    assert len(caught.value.offenders) == 6


def test_a_pattern_that_python_would_never_be_done_with() -> None:
    name = ".".join(f"layers.{n}.self_attn.q_proj" for n in range(40))
    assert Patterns(["([a-z_.0-9]+)+[XY]", "q_proj"], "c.json: rank_pattern").owner_of(name) == "q_proj"


def test_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    found = Patterns([r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1[!X]"], "c.json: alpha_pattern")
    with pytest.raises(MalformedFileError, match=r"more than 0\.05 seconds"):
        found.owner_of("layers.0.self_attn.q_proj" * 20)


def _adapter(folder: Path, alphas: dict[str, float]) -> None:
    folder.mkdir()
    layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    ones = {
        layer.format(n, part): torch.ones(shape) for n in (0, 1, 10) for part, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    save_file(ones, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": alphas, "target_modules": ["q_proj"]}
    config["fan_in_fan_out"] = False
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_alpha_pattern_decides_the_factor_of_each_module(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.q_proj.weight"
    base = {name.format(n): torch.zeros(4, 4) for n in (0, 1, 10)}
    _adapter(tmp_path / "ad", {r"layers\.1\.self_attn\.q_proj": 8, "layers.10.self_attn.q_proj": 16})
    out = wl.apply(base, str(tmp_path / "ad"))
    # B·A of ones with rank 2 has twos; alpha / rank is 1, 4 and 8.
    assert [float(out[name.format(n)].unique()) for n in (0, 1, 10)] == [2.0, 8.0, 16.0]  # type: ignore[index]


def test_a_pattern_that_is_none_is_named_with_its_file(tmp_path: Path) -> None:
    _adapter(tmp_path / "ad", {"(": 3})
    base = {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(4, 4) for n in (0, 1, 10)}
    with pytest.raises(MalformedFileError, match=r"ad/adapter_config\.json") as caught:
        wl.apply(base, str(tmp_path / "ad"))
    assert "alpha_pattern" in str(caught.value) and "'('" in str(caught.value)


def test_a_pattern_that_never_ends_is_no_reason_to_wait(tmp_path: Path) -> None:
    _adapter(tmp_path / "ad", {"([a-z_.0-9]+)+[XY]": 3})
    base = {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(4, 4) for n in (0, 1, 10)}
    out = wl.apply(base, str(tmp_path / "ad"))
    assert all(bool((tensor == 2).all()) for tensor in out.values())


def test_patterns_without_number_are_refused() -> None:
    with pytest.raises(MalformedFileError, match="at most 256"):
        Patterns([f"a{n}|b" for n in range(257)], "here")
    assert Patterns([f"layers.{n}" for n in range(5000)], "here").owner_of("model.layers.4999") == "layers.4999"


def test_values_by_pattern() -> None:
    values = {r"layers\.[01]\..*": 1.0, "q_proj": 2.0}
    assert [matched(values, name, 0.0) for name in ("x.layers.1.q_proj", "x.layers.7.q_proj", "up")] == [1.0, 2.0, 0.0]
