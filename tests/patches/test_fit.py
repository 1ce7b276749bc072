"""What a set of patches does to each tensor, and everything that does not fit, found at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, NamesMismatchError, StackError
from weightlab.patches.fit import Fit, StackEntry, fit, patch_names
from weightlab.patches.patch import Patch
from weightlab.sources.virtual.memory import MemorySource

BASE = {
    "embed.weight": torch.arange(12.0).reshape(4, 3),
    "layers.0.weight": torch.ones(2, 3),
    "layers.1.weight": torch.full((2, 3), 2.0),
    "steps": torch.tensor([1, 2]),
}
MOVED = {name: tensor + 1 for name, tensor in BASE.items()}


def patch_of(tuned: dict[str, Tensor], base: dict[str, Tensor] = BASE, encode: Any = "exact", **options: Any) -> Patch:
    return wl.diff(base, tuned, encode=encode, **options)


def fitted(state: dict[str, Tensor], *patches: Patch, **choice: Any) -> Fit:
    return fit(MemorySource(state), [StackEntry(patch, patch.scale, **choice) for patch in patches])


def modes(found: Fit) -> dict[str, str]:
    return {name: target.mode for name, target in found.targets.items()}


def offenders(error: type[Exception], *arguments: Any, **choice: Any) -> list[str]:
    with pytest.raises(error) as failed:
        fitted(*arguments, **choice)
    return list(failed.value.offenders)  # type: ignore[attr-defined]


FLOATS = [name for name in BASE if name != "steps"]


def test_modes() -> None:
    exact = patch_of(MOVED)
    found = fitted(BASE, exact)
    assert modes(found) == dict.fromkeys(BASE, "restore") and found.reshapes == [] and found.followers == {}
    assert {n for n, t in found.targets.items() if t.opaque} == {"steps"}
    assert all(t.result_digest == exact.records[n].result_digest is not None for n, t in found.targets.items())
    dense = patch_of(MOVED, encode={"steps": "exact", "*": "dense"})
    for found in (fitted(BASE, dense), fitted(BASE, 0.5 * exact, exclude=("steps",))):
        assert {modes(found)[name] for name in FLOATS} == {"sum"}
        assert all(found.targets[name].result_digest is None for name in FLOATS)


def test_two_patches_on_a_tensor_are_a_sum_and_one_alone_is_restored() -> None:
    first = patch_of(BASE | {"layers.0.weight": torch.zeros(2, 3)})
    second = patch_of(BASE | {"layers.0.weight": torch.full((2, 3), 3.0), "layers.1.weight": torch.zeros(2, 3)})
    for patches in ((first, second), (second, first)):
        found = fitted(BASE, *patches)
        assert modes(found) == {"layers.0.weight": "sum", "layers.1.weight": "restore"}
        terms = [term.patch.id for term in found.targets["layers.0.weight"].terms]
        assert terms == sorted([first.id, second.id])
    assert offenders(StackError, BASE, first, second, first) == [first.label]


def test_opaque_tensors_take_one_exact_patch_at_scale_one() -> None:
    first, second = patch_of(MOVED), patch_of(MOVED | {"steps": torch.tensor([5, 5])})
    assert modes(fitted(BASE, 0.0 * first))["steps"] == "sum"
    assert [o.split()[0] for o in offenders(MisfitError, BASE, 2.0 * first)] == ["steps"]
    wrong = offenders(StackError, BASE, first, second)
    assert len(wrong) == 1 and wrong[0].startswith("steps") and first.label in wrong[0]
    assert modes(fitted(BASE, first, second, exclude=("steps",))).keys() == set(FLOATS)


def test_added_and_removed() -> None:
    more = patch_of(BASE | {"new": torch.ones(2)}, allow=["added"])
    less = patch_of({n: t for n, t in BASE.items() if n != "layers.1.weight"}, allow=["removed"])
    found = fitted(BASE, more, less)
    assert modes(found) == {"new": "add", "layers.1.weight": "remove"}
    assert sorted(found.reshapes) == ["layers.1.weight", "new"]
    assert found.targets["new"].result_digest == more.records["new"].result_digest is not None
    assert found.targets["layers.1.weight"].result_digest is None
    assert [o.split(":")[0] for o in offenders(MisfitError, BASE, 0.5 * more)] == ["new"]
    assert "there already" in offenders(NamesMismatchError, BASE | {"new": torch.ones(2)}, more)[0]
    # what is removed, or added twice, can have nothing else done to it
    other = patch_of(BASE | {"layers.1.weight": torch.zeros(2, 3)})
    again = patch_of(BASE | {"new": torch.zeros(2)}, allow=["added"])
    assert [o.split()[0] for o in offenders(StackError, BASE, less, other)] == ["layers.1.weight"]
    assert [o.split()[0] for o in offenders(StackError, BASE, more, again)] == ["new"]
    assert patch_names(more).keys() == set() and patch_names(less).keys() == {"layers.1.weight"}


@pytest.mark.parametrize("encode", ["exact", "dense"])
def test_new_rows(encode: str) -> None:
    rows = torch.cat([BASE["embed.weight"], torch.ones(2, 3)])
    patch = patch_of(BASE | {"embed.weight": rows}, encode=encode, allow=["rows"])
    found = fitted(BASE, patch)
    target = found.targets["embed.weight"]
    assert (target.spec.shape, target.result.shape) == ((4, 3), (6, 3)) and found.reshapes == ["embed.weight"]
    assert [o.split(":")[0] for o in offenders(MisfitError, BASE, 0.5 * patch)] == ["embed.weight"]
    other = patch_of(BASE | {"embed.weight": torch.zeros(4, 3)}, encode="dense")
    assert [o.split()[0] for o in offenders(StackError, BASE, patch, other)] == ["embed.weight"]


def test_all_that_does_not_fit_is_listed() -> None:
    state = BASE | {"embed.weight": torch.zeros(5, 3), "steps": torch.tensor([1, 2], dtype=torch.int32)}
    del state["layers.1.weight"]
    wrong = offenders(NamesMismatchError, state, patch_of(MOVED))
    assert len(wrong) == 3
    assert wrong[0] == f"embed.weight: shape [5, 3] in the checkpoint, [4, 3] in {patch_of(MOVED).label}"
    assert wrong[1].startswith("layers.1.weight") and "not in the checkpoint" in wrong[1]
    assert wrong[2].startswith("steps: dtype I32 in the checkpoint, I64")
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in BASE.items()}
    assert modes(fitted(halves, patch_of(MOVED))).keys() == BASE.keys()  # floats may be of another width


def test_a_renaming_that_lets_all_fit_is_told() -> None:
    state = {f"model.{name}": tensor for name, tensor in BASE.items()}
    with pytest.raises(NamesMismatchError, match=f"all {len(BASE)} tensors pair up") as failed:
        fitted(state, patch_of(MOVED))
    assert "--map" in (failed.value.remedy or "")
    assert modes(fitted(state, patch_of(MOVED), renames={"": "model."})).keys() == state.keys()
    del state["model.steps"]
    with pytest.raises(NamesMismatchError, match="tensors do not fit"):
        fitted(state, patch_of(MOVED))


SHARED = torch.arange(12.0).reshape(4, 3)


def test_one_tensor_under_two_names_is_changed_once() -> None:
    pair = {"embed.weight": SHARED.clone(), "head.weight": SHARED.clone()}
    once = {"embed.weight": SHARED, "head.weight": SHARED}
    same = patch_of({n: t + 1 for n, t in pair.items()}, pair)
    assert [len(t.terms) for t in fitted(once, same).targets.values()] == [1]
    apart = patch_of({"embed.weight": SHARED + 1, "head.weight": SHARED + 2}, pair)
    assert "tied to embed.weight here" in offenders(NamesMismatchError, once, apart)[0]


def test_a_copy_that_the_checkpoint_does_not_store() -> None:
    pair = {"embed.weight": SHARED.clone(), "head.weight": SHARED.clone()}
    alone = {"embed.weight": SHARED}
    assert modes(fitted(alone, patch_of({n: t + 1 for n, t in pair.items()}, pair))) == {"embed.weight": "restore"}
    for tuned, base in (
        ({"embed.weight": SHARED + 1, "head.weight": SHARED + 2}, pair),  # changed in another way
        ({"embed.weight": SHARED + 1, "head.weight": SHARED + 4}, {**pair, "head.weight": SHARED + 3}),  # never tied
    ):
        assert "head.weight" in offenders(NamesMismatchError, alone, patch_of(tuned, base))[0]


def test_parts_of_a_model_are_not_tied_to_one_another() -> None:
    pair = {"a/embed.weight": SHARED.clone(), "b/embed.weight": SHARED.clone()}
    patch = patch_of({n: t + 1 for n, t in pair.items()}, pair)
    assert "b/embed.weight" in offenders(NamesMismatchError, {"a/embed.weight": SHARED}, patch)[0]
    inside = {"a/embed.weight": SHARED.clone(), "a/head.weight": SHARED.clone()}
    patch = patch_of({n: t + 1 for n, t in inside.items()}, inside)
    assert modes(fitted({"a/embed.weight": SHARED}, patch)) == {"a/embed.weight": "restore"}


def test_a_copy_that_the_patch_does_not_name_follows() -> None:
    patch = patch_of({"embed.weight": SHARED + 1}, {"embed.weight": SHARED})
    stored = {"embed.weight": SHARED.clone(), "head.weight": SHARED.clone(), "other": SHARED + 1}
    assert fitted(stored, patch).followers == {"head.weight": "embed.weight"}
    assert modes(fitted(stored, patch)) == {"embed.weight": "restore", "head.weight": "restore"}
    assert fitted(stored, patch, exclude=("head*",)).followers == {}
    layers = {"embed.weight": SHARED.clone(), "layers.0.head": SHARED.clone()}  # one of a layer is equal by chance
    assert fitted(layers, patch).followers == {}
    vector = {"v": torch.arange(3.0)}
    assert fitted({**vector, "w": torch.arange(3.0)}, patch_of({"v": torch.zeros(3)}, vector)).followers == {}


def test_which_tensors_are_meant() -> None:
    patch = patch_of(MOVED)
    entry = StackEntry(patch, 1.0, include=("layers.*",), exclude=("*.1.*",))
    assert entry.targets() == {"layers.0.weight": "layers.0.weight"}
    entry = StackEntry(patch, 1.0, include=("h.*",), renames={"layers.": "h."})
    assert entry.targets() == {"h.0.weight": "layers.0.weight", "h.1.weight": "layers.1.weight"}
    # a pattern that means nothing of the patch is a mistake, unless it means a tensor of the checkpoint
    with pytest.raises(wl.WeightlabError, match="head"):
        StackEntry(patch, 1.0, exclude=("head*",)).targets()
    assert StackEntry(patch, 1.0, exclude=("head*",)).targets(["head.weight"]).keys() == BASE.keys()
