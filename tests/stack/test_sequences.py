"""Any sequence of apply, scale and remove ends on bytes that depend only on what is on; nothing on: on the first."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import weightlab as wl
from tests.cli.tools import content
from tests.stack.models import FLOATS, OPAQUE, Raw, copied, every_dtype, in_memory, moved, raw_of, weights, write
from weightlab.errors import MisfitError, StackError, WeightlabError
from weightlab.tensors.select import matches
from weightlab.tensors.spec import DTYPES

SCALES = [1.0, 1.0, 1.0, 0.0, -1.0, 0.5, 0.3, -1.75, 1e-3]
PATCHES = {  # name: (encoding, parts, dtypes); each touches part b, which an include below can choose
    "exact on all": ("exact", "ab", list(DTYPES)),
    "exact on floats": ("exact", "b", FLOATS),
    "exact on others": ("exact", "b", OPAQUE),
    "dense": ("dense:fp32", "ab", FLOATS),
    "dense and integers": ("dense:bf16", "ab", ["F32", "BF16", "I64", "BOOL"]),
    "sparse": ("sparse:0.3", "ab", FLOATS),
    "low rank": ("low_rank:2", "ab", ["F32", "F16", "F64"]),
    "sign": ("sign", "b", FLOATS),
    "quantized": ("quantized:4", "ab", ["BF16", "F8_E4M3", "F8_E5M2", "F32"]),
}
On = tuple[float, tuple[str, ...]]
"""At which scale a patch is on, and on which tensors alone."""


@dataclass(frozen=True)
class Step:
    verb: str
    names: list[str]
    scale: float
    include: tuple[str, ...]


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["apply", "apply", "apply", "scale", "scale", "remove", "remove", "remove all"]),
        st.lists(st.sampled_from(sorted(PATCHES)), min_size=1, max_size=2),
        st.sampled_from(SCALES),
        st.sampled_from([(), (), ("b.*",)]),
    ),
    min_size=2,
    max_size=7,
)


@dataclass(repr=False)
class Kit:
    """Base, patches and what was computed already: {shards: {what is on: files with tensors}}."""

    place: Path
    base: Raw
    patches: dict[str, wl.Patch]
    made: dict[tuple[int, frozenset[tuple[str, On]]], dict[str, bytes]] = field(default_factory=dict)

    def model(self, shards: int) -> Path:
        return self.place / f"model-{shards}"

    def touched(self, name: str, include: tuple[str, ...]) -> set[str]:
        return {t for t in self.patches[name].records if not include or matches(t, include)}

    def refused(self, on: Mapping[str, On]) -> bool:
        """Whether no sum is defined: a tensor without arithmetic takes one patch, at scale 1 (or 0, which is none)."""
        takes = {n: {t for t in self.touched(n, i) if t.split(".")[1] in OPAQUE} for n, (_, i) in on.items()}
        scaled = any(takes[n] and s not in (0.0, 1.0) for n, (s, _) in on.items())
        return scaled or any(takes[n] & takes[m] for n, m in itertools.combinations(takes, 2))

    def expected(self, on: Mapping[str, On], shards: int) -> dict[str, bytes]:
        """The files of a new checkpoint with that on, written by `apply --out`."""
        key = (shards, frozenset(on.items()))
        if key not in self.made:
            out = self.place / "out"
            operands = [self.patches[n].at(s) for n, (s, _) in on.items()]
            if len({i for _, i in on.values()}) > 1:  # `apply` takes one choice of tensors for all
                wl.apply(self._applied(on, shards), out=out)
                shutil.rmtree(self.place / "stacked")
            else:
                include = next((i for _, i in on.values()), ())
                wl.apply(self.model(shards), operands, include=include, out=out)
            self.made[key] = weights(out)
            shutil.rmtree(out)
        return self.made[key]

    def _applied(self, on: Mapping[str, On], shards: int) -> Path:
        fresh = copied(self.model(shards), self.place / "stacked")
        for name in sorted(on, reverse=True):
            scale, include = on[name]
            wl.apply(fresh, self.patches[name].at(scale), include=include, in_place=True)
        return fresh


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    place = tmp_path_factory.mktemp("sequences")
    base = every_dtype()
    for shards in (1, 2, 3):
        write(place / f"model-{shards}", base, shards)
    patches = {}
    for number, (name, (encode, parts, dtypes)) in enumerate(sorted(PATCHES.items())):
        chosen = [n for n in base if n.split(".")[0] in parts and n.split(".")[1] in dtypes]
        tuned = write(place / f"tuned-{number}", moved(base, chosen, number + 1), 2)
        patches[name] = wl.diff(place / "model-1", tuned, place / f"{number}.safetensors", encode=encode)
        assert len(patches[name].records) >= len(chosen) - 2  # two are empty and cannot change
    return Kit(place, base, patches)


def after(step: Step, on: Mapping[str, On]) -> dict[str, On] | None:
    """What is on after a step; None where the patches that it names make it impossible."""
    names = step.names
    wanted = dict(on)
    if step.verb == "apply":
        if len(set(names)) < len(names) or any(n in on for n in names):
            return None
        return wanted | dict.fromkeys(names, (step.scale, step.include))
    if step.verb == "remove all":
        return {}
    if step.verb == "scale":
        return wanted | {names[0]: (step.scale, on[names[0]][1])} if names[0] in on else None
    if any(n not in on for n in names):
        return None
    return {n: at for n, at in on.items() if n not in names}


def perform(kit: Kit, model: Path, step: Step) -> None:
    patches = [kit.patches[n] for n in step.names]
    if step.verb == "apply":
        wl.apply(model, [p.at(step.scale) for p in patches], include=step.include, in_place=True)
    elif step.verb == "scale":
        wl.scale(model, patches[0], step.scale)
    elif step.verb == "remove":
        wl.remove(model, patches)
    else:
        wl.remove(model, everything=True)


def found_on(kit: Kit, model: Path) -> dict[str, float]:
    names = {p.id: n for n, p in kit.patches.items()}
    status = wl.status(model)
    assert status.intact and status.notes == []
    assert [p.id for p in status.patches] == sorted(p.id for p in status.patches)
    return {names[p.id]: p.scale for p in status.patches}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, shards=st.sampled_from([1, 2, 3]), data=st.data())
def test_only_what_is_on_counts(kit: Kit, steps: list[Step], shards: int, data: st.DataObject) -> None:
    model = copied(kit.model(shards), kit.place / "changed")
    other = kit.place / "other"
    try:
        on: dict[str, On] = {}
        for step in steps:
            wanted = after(step, on)
            if wanted is None or kit.refused(wanted):
                before = content(model)
                with pytest.raises(StackError if wanted is None else MisfitError) as caught:
                    perform(kit, model, step)
                assert caught.value.exit_code == 4
                assert content(model) == before
            else:
                perform(kit, model, step)
                on = wanted
            assert weights(model) == kit.expected(on, shards)
            assert found_on(kit, model) == {n: float(torch.tensor(s)) for n, (s, _) in on.items()}
            assert bool(on) == (model / ".weightlab").exists()
        if on:
            check_other_ways(kit, other, on, shards, data)
            wl.remove(model, everything=True)
        assert content(model) == content(kit.model(shards))
    finally:
        shutil.rmtree(model)
        shutil.rmtree(other, ignore_errors=True)


def check_other_ways(kit: Kit, place: Path, on: Mapping[str, On], shards: int, data: st.DataObject) -> None:
    """The same set put on a fresh copy in another order and with detours, and on a state dict, gives the same bits."""
    fresh = copied(kit.model(shards), place)
    order = data.draw(st.permutations(sorted(on)), "order")
    for name in order:
        scale, include = on[name]
        detour = scale if kit.touched(name, include) & {t for t in kit.base if t.split(".")[1] in OPAQUE} else 0.25
        wl.apply(fresh, kit.patches[name].at(detour), include=include, in_place=True)
    for name in reversed(order):
        wl.scale(fresh, kit.patches[name], on[name][0])
    assert weights(fresh) == kit.expected(on, shards)
    check_in_memory(kit, raw_of(fresh), on)


def check_in_memory(kit: Kit, raw: Mapping[str, bytes], on: Mapping[str, On]) -> None:
    """The same on a state dict, where one call can say it; torch does not hold elements of less than a byte."""
    state = in_memory(kit.base)
    unheld = [{t.split(".")[1] for t in kit.touched(n, i) if t not in state} for n, (_, i) in on.items()]
    if len({include for _, include in on.values()}) > 1 or any(u != unheld[0] for u in unheld):
        return
    found = wl.apply(
        state,
        [kit.patches[n].at(s) for n, (s, _) in on.items()],
        include=next(i for _, i in on.values()),
        exclude=[f"*.{dtype}" for dtype in unheld[0]],
    )
    assert {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in found.items()} == {
        n: raw[n] for n in state
    }


def test_every_encoding_and_dtype_takes_part(kit: Kit) -> None:
    """What the test above draws from: all encodings, and every dtype is touched by a patch that can be alone on it."""
    used = {r.encoding for p in kit.patches.values() for r in p.records.values()}
    assert used == {"exact", "dense", "sparse", "low_rank", "sign", "quantized"}
    assert {r.dtype for r in kit.patches["exact on all"].records.values()} == set(DTYPES)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_order_of_taking_off_does_not_matter(kit: Kit, tmp_path: Path, shards: int) -> None:
    """Three patches, on in one order, off in each of the six."""
    names = ["exact on floats", "sparse", "sign"]
    model = copied(kit.model(shards), tmp_path / "model")
    first = content(model)
    for order in itertools.permutations(names):
        for name in names:
            wl.apply(model, kit.patches[name].at(-1.75), in_place=True)
        left = dict.fromkeys(names, (-1.75, ()))
        for name in order:
            assert weights(model) == kit.expected(left, shards)
            wl.remove(model, kit.patches[name])
            del left[name]
        assert content(model) == first


def test_what_is_refused_lists_every_tensor(kit: Kit, tmp_path: Path) -> None:
    model = copied(kit.model(2), tmp_path / "model")
    patch = kit.patches["exact on others"]
    before = content(model)
    with pytest.raises(WeightlabError) as caught:
        wl.apply(model, patch.at(0.5), in_place=True)
    assert {line.split()[0] for line in caught.value.offenders} == set(patch.records)
    wl.apply(model, patch, in_place=True)
    on = content(model)
    with pytest.raises(StackError) as twice:
        wl.apply(model, kit.patches["exact on all"], in_place=True)
    assert {line.split()[0] for line in twice.value.offenders} == set(patch.records)
    assert content(model) == on
    wl.remove(model, patch)
    assert content(model) == before
