"""The family of task arithmetic: by hand, and against plain sums and sorts over whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightlab as wl
from weightlab.errors import UsageError
from weightlab.methods import METHODS
from weightlab.stream.executor import Resources
from weightlab.tensors import largest
from weightlab.tensors.tiles import TILE

State = dict[str, Tensor]
SHAPES = {"big": (3, TILE // 2 + 5), "matrix": (40, 30), "vector": (17,)}


def random(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def patches(deltas: Sequence[State]) -> list[wl.Patch]:
    zero = {n: torch.zeros_like(t) for d in deltas for n, t in d.items()}
    return [wl.diff({n: zero[n] for n in d}, d, encode="dense:fp32") for d in deltas]


def merged(method: str, deltas: Sequence[State], weights: Sequence[float] = (), **parameters: Any) -> State:
    """What a method makes of differences, as tensors."""
    operands = [p * w for p, w in zip(patches(deltas), weights or [1.0] * len(deltas), strict=True)]
    patch = wl.compose(operands, method=method, parameters=parameters)
    zero = {n: torch.zeros_like(t) for d in deltas for n, t in d.items()}
    return wl.apply(zero, patch)


def row(*numbers: float) -> State:
    return {"w": torch.tensor(numbers)}


def test_ties_by_hand() -> None:
    one, two, three = row(4.0, -3.0, 0.5, 2.0, 1.0), row(-1.0, -5.0, 2.0, 2.0, 0.0), row(1.0, 1.0, -2.5, -9.0, 0.0)
    # density 0.4 keeps two of five: [4, -3, 0, 0, 0], [0, -5, 2, 0, 0] (the first of two 2s), [0, 0, -2.5, -9, 0]
    assert merged("ties", [one, two, three], density=0.4)["w"].tolist() == [4.0, -4.0, -2.5, -9.0, 0.0]
    summed = merged("ties", [one, two, three], density=0.4, normalize=False)["w"].tolist()
    assert summed == [4.0, -8.0, -2.5, -9.0, 0.0]
    # weights: [8, -6, 0, 0, 0], [0, -5, 2, 0, 0], [0, 0, -1.25, -4.5, 0]; divided by those that agree: 2, 3, 1, .5
    weighted = merged("ties", [one, two, three], [2.0, 1.0, 0.5], density=0.4)["w"].tolist()
    assert weighted == pytest.approx([4.0, -11 / 3, 2.0, -9.0, 0.0])
    assert merged("ties", [one, two], **{"lambda": 0.5})["w"].tolist() == [2.0, -2.0, 0.625, 1.0, 0.5]


def test_signs_that_tie_count_as_plus() -> None:
    assert merged("ties", [row(1.0, -2.0), row(-1.0, 2.0)])["w"].tolist() == [1.0, 2.0]


def test_linear_and_task_arithmetic_by_hand() -> None:
    both = [row(1.0, 2.0), row(3.0, -4.0)]
    assert merged("task_arithmetic", both, [1.0, 0.5], **{"lambda": 2.0})["w"].tolist() == [5.0, 0.0]
    assert merged("linear", both, [1.0, 3.0])["w"].tolist() == [2.5, -2.5]
    assert merged("linear", both, normalize=False)["w"].tolist() == [4.0, -2.0]
    assert merged("linear", both, [1.0, -1.0])["w"].tolist() == [-2.0, 6.0]  # weights that sum to 0 do not divide
    alone = [row(2.0), {"w": torch.tensor([4.0]), "v": torch.tensor([8.0])}]  # one that lacks a tensor is zero there
    assert {n: t.tolist() for n, t in merged("linear", alone).items()} == {"w": [3.0], "v": [4.0]}


def reference(deltas: Sequence[State], weights: Sequence[float], densities: Sequence[float], rescale: bool) -> State:
    """TIES over whole tensors, with a sort."""
    found = {}
    for name in deltas[0]:
        rows = []
        for delta, weight, density in zip(deltas, weights, densities, strict=True):
            flat = delta[name].flatten()
            order = torch.argsort(flat.abs(), descending=True, stable=True)[: max(1, int(density * flat.numel()))]
            kept = torch.zeros_like(flat)
            kept[order] = flat[order]
            if rescale:
                kept *= flat.abs().double().sum() / kept.abs().double().sum()
            rows.append(kept * weight)
        stacked, signs = torch.stack(rows), torch.tensor(weights)[:, None]
        agrees = (stacked != 0) & ((stacked > 0) == (stacked.sum(0) >= 0))
        divisor = (agrees * signs).sum(0)
        divisor[divisor == 0] = 1
        found[name] = ((stacked * agrees).sum(0) / divisor).view(deltas[0][name].shape)
    return found


@pytest.mark.parametrize("last", [0.7, -0.7])
@pytest.mark.parametrize("rescale", [False, True])
def test_ties_against_sorts(rescale: bool, last: float) -> None:
    deltas = [random(seed) for seed in range(3)]
    deltas[1] = {n: (t * 8).round() / 8 for n, t in deltas[1].items()}  # with many equals
    weights, densities = [0.5, 1.0, last], [0.2, 0.1, 0.9]
    found = merged("ties", deltas, weights, density=densities, rescale=rescale)
    meant = reference(deltas, weights, densities, rescale)
    for name in SHAPES:
        assert torch.allclose(found[name], meant[name], rtol=1e-5, atol=1e-6), name


def test_more_patterns_than_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [{n: (t * 8).round() / 8 for n, t in random(seed).items()} for seed in range(2)]
    found = merged("ties", deltas, density=0.2)
    monkeypatch.setattr(largest, "_REMEMBERED", 0)
    again = merged("ties", deltas, density=0.2)
    assert all(torch.equal(found[name], again[name]) for name in SHAPES)


def test_zeros_of_ties_have_no_sign() -> None:
    found = wl.compose(
        patches([row(-0.5, 4.0, -0.0), row(-0.5, -9.0, 0.0)]), method="ties", parameters={"density": 0.4}
    )
    values = wl.apply({"w": torch.full((3,), -0.0)}, found)["w"]
    assert values.tolist() == [0.0, -9.0, 0.0] and values.signbit().tolist() == [True, True, True]  # kept as they were


def test_scope_model_keeps_a_share_of_all_tensors_together() -> None:
    one, two = random(0), random(1)
    one["matrix"] *= 100
    found = merged("ties", [one, two], [1.0, 0.0], density=0.001, scope="model")
    kept = {n: int((t != 0).sum()) for n, t in found.items()}
    assert sum(kept.values()) == int(0.001 * sum(t.numel() for t in one.values())) and kept["matrix"] > 700
    each = merged("ties", [one, two], [1.0, 0.0], density=0.001)
    assert {n: int((t != 0).sum()) for n, t in each.items()} == {"big": 786, "matrix": 1, "vector": 1}


def test_dare_keeps_at_random_and_rescales_to_the_norm() -> None:
    delta = random(0)
    found = merged("dare_linear", [delta], density=0.3, seed=5)
    for name in ("big", "matrix"):
        share = float((found[name] != 0).float().mean())
        assert share == pytest.approx(0.3, abs=0.05)
        assert float(found[name].abs().sum()) == pytest.approx(float(delta[name].abs().sum()), rel=1e-4)
        ratio = found[name][found[name] != 0] / delta[name][found[name] != 0]
        assert float(ratio.max() - ratio.min()) < 1e-4  # one factor a tensor
    again, other = (merged("dare_linear", [delta], density=0.3, seed=seed) for seed in (5, 6))
    assert all(torch.equal(found[n], again[n]) for n in found) and not torch.equal(found["big"], other["big"])
    plain = merged("dare_linear", [delta], density=0.3, seed=5, rescale=False)
    kept = plain["big"] != 0
    assert torch.equal(plain["big"][kept], delta["big"][kept]) and torch.equal(kept, found["big"] != 0)
    first, second = (
        merged("dare_linear", [delta, random(1)], [1.0, 0.0], density=0.5),
        merged("dare_linear", [delta, random(1)], [0.0, 1.0], density=0.5),
    )
    both = (first["big"] != 0) & (second["big"] != 0)
    assert float(both.float().mean()) == pytest.approx(0.25, abs=0.01)  # each is dropped on its own


@pytest.mark.parametrize("method", METHODS.names())
def test_order_and_threads_do_not_matter(method: str, tmp_path: Path) -> None:
    deltas = [random(seed) for seed in range(3)]
    parts, weights = patches(deltas), [0.5, 1.0, -0.7]
    density = {"density": [0.2, 0.5, 0.9]} if "density" in METHODS.get(method).parameters else {}
    found = []
    for threads, order in ((1, [0, 1, 2]), (3, [2, 0, 1])):
        own = {name: [values[i] for i in order] for name, values in density.items()}
        operands = [parts[i] * weights[i] for i in order]
        place = tmp_path / f"{threads}.safetensors"
        wl.compose(operands, place, method=method, parameters=own, resources=Resources(threads=threads))
        found.append(place.read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("method", METHODS.names())
def test_doubles_bf16_and_empty_tensors(method: str) -> None:
    base = {"d": torch.zeros(30, dtype=torch.float64), "h": torch.zeros(30, dtype=torch.bfloat16), "e": torch.zeros(0)}
    deltas = [{n: torch.randn_like(t) for n, t in base.items()} for _ in range(2)]
    given = [wl.diff(base, d, encode="dense") for d in deltas]
    found = wl.apply(base, wl.compose(given, method=method))
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in base.items()}
    if method == "task_arithmetic":
        assert torch.allclose(found["d"], deltas[0]["d"] + deltas[1]["d"], rtol=1e-6)
    assert bool(found["d"].any()) and bool(found["h"].any())


def test_an_exact_result() -> None:
    base = random(0)
    tuned = [{n: t + 0.1 * random(s)[n] for n, t in base.items()} for s in (1, 2)]
    given = [wl.diff(base, t, encode="exact") for t in tuned]
    exact = wl.compose(given, base=base, method="ties", parameters={"density": 0.5})
    assert exact.header.result is not None and {r.encoding for r in exact.records.values()} == {"exact"}
    dense = wl.compose(given, base=base, method="ties", parameters={"density": 0.5}, encode="dense:fp32")
    once, twice = wl.apply(base, exact), wl.apply(base, dense)
    assert all(torch.equal(once[n], twice[n]) for n in base)


def test_what_makes_no_sense_is_refused() -> None:
    given = patches([row(1.0), row(2.0)])
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("tie", {}, "did you mean 'ties'"),
        ("ties", {"densty": 0.1, "weight": 1.0}, "densty"),
        ("ties", {"density": 1.5}, "from 0 to 1"),
        ("ties", {"density": [0.1, 0.2, 0.3]}, "3 values for 2"),
        ("ties", {"lambda": [1, 2]}, "one for all"),
        ("ties", {"scope": "layer"}, "tensor or model"),
        ("ties", {"normalize": "perhaps"}, "true or false"),
        ("dare_ties", {"seed": 1.5}, "whole number"),
        ("ties", {"lambda": float("nan")}, "a number"),
    ]
    for method, parameters, words in wrong:
        with pytest.raises(UsageError) as error:
            wl.compose(given, method=method, parameters=parameters)
        assert words in str(error.value) + str(error.value.remedy) + str(error.value.offenders), words
