"""How models and patches are named."""

from __future__ import annotations

from pathlib import Path

import pytest

import weightlab as wl
from tests.ops.test_apply_out import state
from weightlab.errors import MissingInputError, UsageError
from weightlab.ops.operands import label_of, model_path, open_patches, parse_patch


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
