"""Codes and their scales: which names meet them, and how they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from weightlab.errors import MisfitError
from weightlab.tensors.codes import Code, codes_met, described, refusal, require_same_form, separated, separation
from weightlab.tensors.spec import TensorSpec


@dataclass
class Model:
    label: str
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    codes: Mapping[str, Code] = field(default_factory=dict)


def model(label: str, *tensors: str, aliases: Mapping[str, str] | None = None, **codes: str) -> Model:
    """`tensors`: "name DTYPE"; `codes`: the module of each that is a code, dots as `__`."""
    pairs = [text.split() for text in tensors]
    specs = {name: TensorSpec(name, dtype, (4, 4)) for name, dtype in pairs}
    found = {name.replace("__", "."): Code("codes of fp8", module) for name, module in codes.items()}
    return Model(label, specs, aliases or {}, found)


FP8 = model("Q", "a.weight F8_E4M3", "a.scale F32", "b.weight BF16", a__weight="a", a__scale="a")
PACKED = model("P", "a.qweight I32", "a.scales F16", "c I64", a__qweight="a", a__scales="a")
PLAIN = model("M", "a.weight BF16", "b.weight BF16")


def test_which_names_meet_codes() -> None:
    assert codes_met(PLAIN, ["a.weight"]) == {}
    assert set(codes_met(FP8, ["a.weight", "a.scale", "b.weight", "nothing", "a.bias"])) == {"a.weight", "a.scale"}
    # what is stored packed has no tensor of the weight's own name
    assert set(codes_met(PACKED, ["a.weight", "a", "a.bias", "c", "b.weight"])) == {"a.weight", "a"}
    tied = model("T", "a.weight F8_E4M3", aliases={"head.weight": "a.weight"}, a__weight="a")
    assert codes_met(tied, ["head.weight"]) == {"head.weight": tied.codes["a.weight"]}
    bare = model("B", "a F8_E4M3", "a.bias F32", a="a")
    assert set(codes_met(bare, ["a", "a.bias", "a.weight"])) == {"a", "a.weight"}


def test_a_line_for_each_with_what_belongs_to_it() -> None:
    assert described(FP8, codes_met(FP8, ["a.weight"])) == [f"{FP8.specs['a.weight']}: codes of fp8, with scale"]
    assert described(PACKED, codes_met(PACKED, ["a.weight"])) == ["a.weight: codes of fp8, with qweight, scales"]
    alone = model("A", "a F8_E4M3", a="a")
    assert described(alone, alone.codes) == [f"{alone.specs['a']}: codes of fp8"]


def test_the_refusal_names_who_has_codes() -> None:
    error = refusal(FP8, names=["a.weight"])
    assert error.message.startswith("Q: these weights are codes") and len(error.offenders) == 1
    error = refusal(PLAIN, FP8, PACKED, names=["a.weight", "a.qweight", "b.weight"])
    assert error.message.startswith("Q, P: ")
    assert [line.split()[0].rstrip(":") for line in error.offenders] == ["a.weight", "a.qweight", "b.weight"]
    whole = refusal(PACKED, names=["c"])
    assert whole.message == "P: no sums are defined on tensors of integers"
    assert whole.offenders == (str(PACKED.specs["c"]),) and whole.exit_code == 4


@pytest.mark.parametrize(("one", "other"), [(FP8, PLAIN), (PLAIN, FP8), (PACKED, PLAIN), (PLAIN, PACKED)])
def test_one_in_codes_and_one_not(one: Model, other: Model) -> None:
    with pytest.raises(MisfitError, match="one is in codes, the other is not") as failed:
        require_same_form(one, other)
    coded = one if one.codes else other
    assert f"{coded.label} is quantised, M is not" in failed.value.message and len(failed.value.offenders) == 1


def test_the_same_form() -> None:
    for one, other in (
        (FP8, FP8),
        (PACKED, PACKED),
        (FP8, model("N", "b.weight BF16")),
        (PACKED, model("I", "a.weight I32")),  # not a float: no plain weight
        (FP8, model("S", "a.weight F8_E4M3")),  # the same dtype, whatever is said of it
    ):
        require_same_form(one, other)
        require_same_form(other, one)


def test_codes_and_scales_stand_or_fall_together() -> None:
    codes = {**FP8.codes, "z.scale": Code("x", "z")}
    assert separated(codes, ["a.weight"], ["a.scale", "b.weight", "z.scale"]) == {"a": ["a.scale"]}
    assert separated(codes, ["b.weight"], ["a.weight", "a.scale"]) == {}
    assert separated(codes, ["a.weight", "a.scale"], ["z.scale"]) == {}
    error = separation("p", {"b": ["b.10", "b.2"], "a": ["a.1"]})
    assert error.offenders == ("a.1", "b.2", "b.10") and error.message.startswith("p: ")
