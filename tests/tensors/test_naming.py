"""Renamings inferred from names and shapes."""

from __future__ import annotations

import pytest

from weightlab.errors import NamesMismatchError
from weightlab.tensors.naming import Found, infer, norm_renames, options, remedy, resolve, with_norms
from weightlab.tensors.select import rename
from weightlab.tensors.spec import TensorSpec

Specs = dict[str, TensorSpec]


def specs(*names: str) -> Specs:
    """A shape of its own for every name's last two words and layer."""
    return {n: TensorSpec(n, "F32", (len(n.rsplit(".", 2)[-2]) if "." in n else 1, 3)) for n in names}


PLAIN = specs(
    "model.embed.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp_up", "ln")),
    "lm_head.weight",
)


def moved(given: Specs, old: str, new: str) -> Specs:
    return {m: TensorSpec(m, s.dtype, s.shape) for n, s in given.items() for m in [n.replace(old, new, 1)]}


def put_before(given: Specs, prefix: str) -> Specs:
    return {prefix + n: TensorSpec(prefix + n, s.dtype, s.shape) for n, s in given.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "anything."])
def test_a_prefix_either_way(prefix: str) -> None:
    with_it = put_before(PLAIN, prefix)
    (there,) = infer(with_it, PLAIN)
    assert there.renames == {prefix: ""} and there.paired == len(PLAIN)
    (back,) = infer(PLAIN, with_it)
    assert back.renames == {"": prefix} and set(rename(PLAIN, back.renames).values()) == set(with_it)


def test_one_tensor_without_the_prefix() -> None:
    mixed = put_before(PLAIN, "module.") | specs("step.count")
    plain = PLAIN | specs("step.count")
    for given, wanted in ((mixed, plain), (plain, mixed)):
        (found,) = infer(given, wanted)
        assert set(rename(given, found.renames).values()) == set(wanted)


def test_wrappers_in_the_middle() -> None:
    wrapped = moved(PLAIN, "model.layers.", "_fsdp_wrapped_module.model.layers.")
    wrapped = moved(wrapped, ".attn.", "._checkpoint_wrapped_module.attn.")
    (found,) = infer(wrapped, PLAIN)
    assert found.paired == len(PLAIN)
    assert set(rename(wrapped, found.renames).values()) == set(PLAIN)


def test_a_text_model_in_a_larger_one() -> None:
    larger = moved(PLAIN, "model.", "model.language_model.") | specs("model.vision.patch.weight")
    (found,) = infer(PLAIN, larger)
    assert found.renames == {"model.": "model.language_model."} and found.paired == len(PLAIN)


def test_two_towers_alike_are_not_guessed_between() -> None:
    both = put_before(PLAIN, "left.") | put_before(PLAIN, "right.")
    assert [dict(f.renames) for f in infer(PLAIN, both)] == [{"": "left."}, {"": "right."}]
    with pytest.raises(NamesMismatchError) as caught:
        resolve(PLAIN, both, "auto")
    assert caught.value.offenders == ("--map =left.", "--map =right.")


def test_norms_are_renamed_only_where_the_other_has_them() -> None:
    old = specs("a.LayerNorm.gamma", "a.LayerNorm.beta", "b.gamma", "a.dense.weight")
    new = specs("a.LayerNorm.weight", "a.LayerNorm.bias", "b.gamma", "a.dense.weight")
    there = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
    assert norm_renames(old, new) == there
    assert set(rename(old, there).values()) == set(new)
    assert norm_renames(new, old) == {new: old for old, new in there.items()}
    assert norm_renames(new, new) == {}


def test_equal_and_unrelated_names_need_none() -> None:
    assert infer(PLAIN, PLAIN) == [] and resolve(PLAIN, PLAIN, "auto") == {}
    with pytest.raises(NamesMismatchError, match="no renaming"):
        resolve(PLAIN, specs("q.r.s"), "auto")


def test_what_to_type() -> None:
    assert options({"module.": "", "": "x."}) == "--map =x. --map module.="


def test_wrappers_in_the_middle_of_the_other_names() -> None:
    wrapped = "_fsdp_wrapped_module"
    there = {
        m: TensorSpec(m, s.dtype, s.shape)
        for n, s in PLAIN.items()
        for m in [n.replace("model.layers.1.", f"model.layers.1.{wrapped}.")]
    }
    (found,) = infer(PLAIN, there)
    assert found.renames == {"model.layers.1.": f"model.layers.1.{wrapped}."} and found.paired == len(PLAIN)
    assert set(rename(PLAIN, found.renames).values()) == set(there)


def test_many_renamings_are_not_listed() -> None:
    many = {f"layers.{i}.": f"layers.{i}._checkpoint_wrapped_module." for i in range(40)}
    assert remedy([Found(many, 40)]).startswith("pass --map auto, which is 40 renamings such as --map layers.0.=")


def test_norms_are_paired_up_module_by_module() -> None:
    """One module of the two has the other spelling: a rule for all of that name would part the other."""
    given = specs("a.LayerNorm.weight", "b.LayerNorm.weight", "b.LayerNorm.bias")
    wanted = specs("a.LayerNorm.weight", "b.LayerNorm.gamma", "b.LayerNorm.beta")
    rules = with_norms(given, wanted, {})
    assert rename(given, rules) == {
        "a.LayerNorm.weight": "a.LayerNorm.weight",
        "b.LayerNorm.weight": "b.LayerNorm.gamma",
        "b.LayerNorm.bias": "b.LayerNorm.beta",
    }
    beside = with_norms(put_before(given, "module."), wanted, {"module.": ""})
    assert list(rename(put_before(given, "module."), beside).values()) == list(wanted)
    assert with_norms(given, given, {}) == {}


def test_a_norm_of_which_both_spellings_are_there_is_left() -> None:
    given = specs("a.LayerNorm.weight", "a.LayerNorm.gamma")
    assert with_norms(given, specs("a.LayerNorm.gamma"), {}) == {}
