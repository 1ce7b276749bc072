"""Checkpoints that are computed while they are read."""

from __future__ import annotations

import pytest
import torch

import weightlab as wl
from tests.sources.test_local import read
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patched_source import DeltaSource, PatchedSource
from weightlab.sources.virtual.memory import MemorySource
from weightlab.tensors.tiles import TILE

ROWS = TILE // 64 + 37  # more than one tile, and no whole number of them


def big(seed: int = 0, change: float = 0.0) -> dict[str, torch.Tensor]:
    fixed, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    shapes = {"big": (ROWS, 64), "small": (5,)}
    found = {n: torch.randn(s, generator=fixed) for n, s in shapes.items()}
    return {n: t + change * torch.randn(t.shape, generator=own) for n, t in found.items()}


@pytest.mark.parametrize("encode", ["exact", "dense", "quantized:8", "sparse:0.2", "low_rank:3", "sign"])
def test_ranges_are_pieces_of_the_whole(encode: str) -> None:
    base = big()
    patch = wl.diff(base, big(1, 0.1), encode=encode)
    right = wl.apply(base, 0.5 * patch)
    memory = MemorySource(base)
    patched = PatchedSource(memory, fit(memory, [StackEntry(patch, 0.5)]))
    assert all(torch.equal(read(patched, n), right[n]) for n in base)
    delta = DeltaSource([patch], memory, list(base))
    whole = read(delta, "big").reshape(-1)
    for start, count in ((0, 5), (TILE - 3, 7), (TILE, 64), (ROWS * 64 - 9, 9)):
        out = torch.empty(count * 4, dtype=torch.uint8)
        patched.read("big", start * 4, out)
        assert torch.equal(out.view(torch.float32), right["big"].reshape(-1)[start : start + count])
        delta.read("big", start * 4, out)
        assert torch.equal(out.view(torch.float32), whole[start : start + count])


@pytest.mark.parametrize("encode", ["exact", "low_rank:3", "quantized:4:linear:channel"])
def test_what_a_tensor_needed_is_let_go_after_its_last_tile(encode: str) -> None:
    base = big()
    patch = wl.diff(base, big(1, 0.1), encode=encode)
    delta = DeltaSource([patch], MemorySource(base), ["big"])
    read(delta, "big")
    ((_, parts),) = delta._terms["big"]
    assert parts._cache == {}
    assert torch.equal(read(delta, "big"), read(delta, "big"))  # and made anew when it is needed again


def test_sums_are_in_the_order_of_the_ids() -> None:
    base = big()
    patches = [wl.diff(base, big(seed, 0.1), encode="dense") for seed in (1, 2, 3)]
    found = [read(DeltaSource(p, None, ["big"]), "big") for p in (patches, patches[::-1])]
    assert torch.equal(*found)
    scaled = read(DeltaSource([2 * patches[0]], None, ["small"]), "small")
    assert torch.allclose(scaled, 2 * (big(1, 0.1)["small"] - base["small"]), atol=1e-6)
