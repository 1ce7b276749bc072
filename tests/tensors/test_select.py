"""Globs and prefixes; nothing misspelt passes in silence."""

from __future__ import annotations

import pytest

from weightlab.errors import NamesMismatchError, UsageError
from weightlab.tensors.order import layer_of, natural_key
from weightlab.tensors.select import matches, parse_renames, patterns, rename, select

NAMES = ["model.layers.0.w", "model.layers.10.w", "model.layers.2.w", "lm_head.weight", "odd[0]"]


def test_globs() -> None:
    assert select(NAMES, [], []) == NAMES
    assert select(NAMES, ["model.*"], ["*.2.*"]) == NAMES[:2]
    assert select(NAMES, "*.w", "*.0.*") == NAMES[1:3]  # a string is one glob
    assert select(NAMES, ["lm_head*", "*.w"], []) == NAMES[:4]  # the order is the names'
    assert select(NAMES, ["model.layers.[02].w"], []) == [NAMES[0], NAMES[2]]
    assert not matches("Model.w", ["model.*"])
    assert patterns("abc") == ("abc",) and patterns(["a", "b"]) == ("a", "b") and patterns(()) == ()


def test_patterns_that_match_nothing_are_all_listed() -> None:
    with pytest.raises(UsageError) as failed:
        select(NAMES, ["modle.*", "model.*"], ["*.bias"])
    assert failed.value.offenders == ("'modle.*'", "'*.bias'")


def test_prefixes() -> None:
    assert parse_renames(["bert.=", "=x.", "a=b=c"]) == {"bert.": "", "": "x.", "a": "b=c"}
    for wrong in (["bert."], ["="], ["a=b", "a=c"]):
        with pytest.raises(UsageError, match="--map"):
            parse_renames(wrong)
    assert rename(["a.b.c", "a.d", "e"], {"a.": "x.", "a.b.": "y."}) == {"a.b.c": "y.c", "a.d": "x.d", "e": "e"}
    with pytest.raises(UsageError) as idle:
        rename(["a"], {"b.": "", "c.": "x"})
    assert idle.value.offenders == ("b.", "c.")
    with pytest.raises(NamesMismatchError) as clash:
        rename(["x.a", "a", "y.b", "b"], {"x.": "", "y.": ""})
    assert len(clash.value.offenders) == 2


def test_natural_order_and_layers() -> None:
    assert sorted(NAMES, key=natural_key) == [
        "lm_head.weight",
        "model.layers.0.w",
        "model.layers.2.w",
        "model.layers.10.w",
        "odd[0]",
    ]
    assert sorted(["a", "a1", "a01", "1", "1a", ""], key=natural_key)[0] == ""
    assert [layer_of(n) for n in ("a.1.b.2.c", "a.b", "a", "1.w")] == ["a.1", "a", "a", "1"]
