"""Normalisation layers by their names, and how they are asked for."""

from __future__ import annotations

import pytest

from weightlab.errors import UsageError
from weightlab.extract.norms import norm_tensors, parse_norm


@pytest.mark.parametrize(
    ("text", "mode", "share"),
    [
        ("keep", "keep", 1.0),
        ("robust", "robust", 1.0),
        ("recalibrate", "recalibrate", 1.0),
        ("blend:0", "blend", 0.0),
        ("blend:0.25", "blend", 0.25),
        ("blend:1", "blend", 1.0),
    ],
)
def test_what_is_understood(text: str, mode: str, share: float) -> None:
    assert parse_norm(text) == (mode, share)


@pytest.mark.parametrize(
    "text", ["", "blend", "blend:", "blend:x", "blend:-0.1", "blend:1.1", "blend:nan", "keep:1", "keep:", "other"]
)
def test_what_is_not(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        parse_norm(text)


def test_layers_with_running_statistics() -> None:
    names = [
        *("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
        *("plain.running_mean", "plain.running_var", "norm.weight", "norm.bias", "running_mean", "weight"),
    ]
    assert norm_tensors(names) == (
        ["bn.weight", "bn.bias", "weight"],
        ["bn.running_mean", "bn.running_var", "plain.running_mean", "plain.running_var", "running_mean"],
    )
    assert norm_tensors(["norm.weight", "norm.bias"]) == ([], [])
