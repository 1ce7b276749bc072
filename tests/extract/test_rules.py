"""Rules by name: who gets which encoding, and what is said of rules that make no sense."""

from __future__ import annotations

import pytest

from weightlab.errors import UsageError
from weightlab.extract.rules import EncodeRules, Rules, parse_choice
from weightlab.tensors.spec import TensorSpec


def spec(name: str, *shape: int, dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def chosen(rules: EncodeRules, name: str, *shape: int) -> str:
    tensor = spec(name, *(shape or (64, 64)))
    choice = Rules(rules).choose(tensor, tensor, opaque=False)
    return choice.name + (f" instead of {choice.fallback}" if choice.fallback else "")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (None, ["exact", "exact"]),
        ((), ["exact", "exact"]),
        ("dense", ["dense", "dense"]),
        (["low_rank:4", "*norm*=dense:fp32"], ["dense", "low_rank"]),
        (["*norm*=dense:fp32", "low_rank:4"], ["dense", "low_rank"]),
        ({"*": "low_rank:4", "*norm*": "dense"}, ["dense", "low_rank"]),
        ("*norm*=dense", ["dense", "exact"]),
        ({"a.*": "sign", "*.norm": "dense"}, ["sign", "exact"]),  # the first that matches
        (["a=b.norm=dense", "sign"], ["sign", "sign"]),  # what follows the last = is the encoding
    ],
)
def test_the_first_pattern_wins_and_the_general_rule_is_last(rules: EncodeRules, expected: list[str]) -> None:
    assert [chosen(rules, "a.norm"), chosen(rules, "b.proj")] == expected


def test_what_an_encoding_cannot_help_is_dense_and_says_so() -> None:
    for rule in ("low_rank:4", "sparse:0.1", "sign"):
        name = rule.split(":")[0]
        assert chosen(rule, "w", 64) == chosen(rule, "w", 1) == f"dense instead of {name}"
        assert chosen(rule, "w", 64, 64) == name
    assert chosen("quantized:8:log", "w", 3) == "dense instead of quantized"
    assert chosen("dense:bf16", "w", 0) == "dense" and chosen("exact", "w") == "exact"


def test_the_parameters_go_with_the_choice() -> None:
    matrix, vector = spec("w", 64, 64), spec("b", 64)
    rules = Rules("low_rank:4:bf16")
    assert rules.choose(matrix, matrix, opaque=False).parameters == {"rank": 4, "dtype": "bf16"}
    assert rules.choose(vector, vector, opaque=False).parameters == {}


def test_what_holds_values_is_stored_as_values() -> None:
    rules = Rules("quantized:4")
    before, after = spec("w", 64, 64), spec("w", 70, 64)
    assert rules.choose(None, after, opaque=False).name == "exact"
    assert rules.choose(before, before, opaque=True).name == "exact"
    grown = rules.choose(before, after, opaque=False)
    assert (grown.name, grown.fallback) == ("dense", "quantized")
    assert Rules("dense:fp32").choose(before, after, opaque=False).parameters == {"dtype": "fp32"}
    assert Rules("exact").choose(before, after, opaque=False).name == "exact"


def test_the_dtype_that_counts_is_the_bases() -> None:
    """Factors in fp32 help a tensor of 32 bits and not one of 16: the patch lands in the base's dtype."""
    narrow, wide = spec("w", 12, 12, dtype="BF16"), spec("w", 12, 12)
    assert Rules("low_rank:4").choose(narrow, wide, opaque=False).name == "dense"
    assert Rules("low_rank:4").choose(wide, narrow, opaque=False).name == "low_rank"


@pytest.mark.parametrize(
    "rules",
    [
        "dence",
        "low_rank",
        "quantized:9",
        ["dense", "sign"],  # two for all
        {"*": "no"},
        ["*norm*="],
        "",
    ],
)
def test_rules_that_are_not_understood(rules: EncodeRules) -> None:
    with pytest.raises(UsageError) as caught:
        Rules(rules)
    assert caught.value.exit_code == 2


def test_patterns_that_are_not_used_are_listed() -> None:
    names = ["a.norm", "b.proj"]
    Rules(["*norm=dense", "b*=sign", "exact"]).check_used(names)
    with pytest.raises(UsageError) as caught:
        Rules(["*nrom*=dense", "a.*=sign", "a.norm=dense", "c=exact"]).check_used(names)
    assert caught.value.offenders == ("*nrom*", "a.norm", "c")


def test_any_lossless() -> None:
    assert Rules(None).any_lossless and Rules({"a": "dense", "b": "exact"}).any_lossless
    assert not Rules("dense").any_lossless
    assert parse_choice("sparse:0.5").parameters == {"share": 0.5, "choice": "magnitude"}
