"""Which tensors of several models belong together, and what of them can be summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weightlab.errors import MisfitError, NamesMismatchError
from weightlab.ops.alike import require_shapes, shared_names, under_target_names
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources

STATE = {
    "embed.weight": torch.arange(12.0).reshape(4, 3),
    "layer.weight": torch.ones(3, 3),
    "ids": torch.arange(4).reshape(1, 4),
    "steps": torch.tensor(3),
}
FLOATS = ["embed.weight", "layer.weight"]


def shared(*states: dict[str, Tensor], **options: Any) -> dict[str, tuple[str, ...]]:
    return shared_names([MemorySource(state) for state in states], Resources(), **options)


def test_floats_are_summed_and_integers_stay() -> None:
    for count in (2, 3):
        assert shared(*[STATE] * count) == {name: (name,) * count for name in FLOATS}
    assert shared(STATE | {"steps": torch.tensor(9)}, STATE).keys() == set(FLOATS)  # a counter may differ
    other = STATE | {"ids": torch.arange(1, 5).reshape(1, 4)}
    with pytest.raises(MisfitError, match="integer buffers are not the same") as failed:
        shared(STATE, other)
    assert [line.split(":")[0] for line in failed.value.offenders] == ["ids"]
    assert shared(STATE, other, exclude=["ids"]).keys() == set(FLOATS)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_that_one_lacks_or_has_beyond_is_listed(count: int) -> None:
    odd = {n: t for n, t in STATE.items() if n != "layer.weight"} | {"new": torch.ones(1), "newer": torch.ones(1)}
    word = {2: "two", 3: "three", 4: "4"}[count]
    with pytest.raises(NamesMismatchError, match=f" tensors are not in all {word} models") as failed:
        shared(*[STATE] * (count - 2), odd, STATE)
    names = [line.split()[0] for line in failed.value.offenders]
    others = ["layer.weight"] * (count - 2)  # which have it beyond what all have
    assert names == ["layer.weight", *others, "new", "newer"]
    assert shared(odd, STATE, include=["embed*"]) == {"embed.weight": ("embed.weight",) * 2}
    assert shared(odd, STATE, exclude=["layer*"], include=["*.weight"]).keys() == {"embed.weight"}


def test_other_names() -> None:
    other = {f"model.{name}": tensor for name, tensor in STATE.items()}
    with pytest.raises(NamesMismatchError, match="4 tensors pair up by a renaming") as failed:
        shared(other, STATE)
    assert "--map" in (failed.value.remedy or "")
    for renames in ({"": "model."}, "auto"):
        assert shared(other, STATE, renames=renames) == {name: (f"model.{name}", name) for name in FLOATS}
    seen = under_target_names(MemorySource(other), {"layer.weight": ("model.layer.weight", "layer.weight")}, 0)
    assert set(seen.specs) == {"layer.weight", *other} - {"model.layer.weight"}


def test_a_tied_tensor_may_be_stored_once() -> None:
    pair = STATE | {"head.weight": STATE["embed.weight"].clone()}
    assert shared(STATE, pair)["head.weight"] == ("embed.weight", "head.weight")
    assert shared(pair, STATE).keys() == set(FLOATS)  # the other's copy is redundant
    with pytest.raises(NamesMismatchError):
        shared(STATE | {"head.weight": STATE["embed.weight"] + 1}, STATE)


def test_shapes() -> None:
    wider = MemorySource(STATE | {"layer.weight": torch.ones(3, 5)})
    names = {name: (name, name) for name in FLOATS}
    require_shapes([MemorySource(STATE), MemorySource(STATE)], names)
    with pytest.raises(NamesMismatchError, match="1 tensors have other shapes") as failed:
        require_shapes([wider, MemorySource(STATE)], names)
    assert failed.value.offenders == ("layer.weight: [3, 5], [3, 3]",)
