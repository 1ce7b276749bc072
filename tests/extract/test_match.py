"""Pairing two checkpoints: tied tensors under any of their names, redundant copies, everything else listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import NamesMismatchError
from weightlab.extract.diff import match_sources
from weightlab.extract.match import aligned, stored_name
from weightlab.ops.operands import reading
from weightlab.sources.virtual.memory import MemorySource

EMBED, HEAD, PROJ = "model.embed_tokens.weight", "lm_head.weight", "model.proj"


def weights(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 20, generator=generator), torch.randn(20, 20, generator=generator)


def once(seed: int = 0) -> dict[str, Tensor]:
    """As `save_pretrained` writes a tied model."""
    embed, proj = weights(seed)
    return {EMBED: embed, PROJ: proj}


def twice(seed: int = 0) -> dict[str, Tensor]:
    """As other writers do: the same bytes again."""
    return once(seed) | {HEAD: weights(seed)[0].clone()}


def tied(seed: int = 0) -> dict[str, Tensor]:
    """As the module's own state dict: two names of one storage."""
    state = once(seed)
    return state | {HEAD: state[EMBED]}


@pytest.mark.parametrize("base", [once, twice, tied])
@pytest.mark.parametrize("tuned", [once, twice, tied])
def test_a_tied_head_is_no_difference_however_it_is_stored(base: object, tuned: object, tmp_path: Path) -> None:
    assert callable(base) and callable(tuned)
    before, after = base(0), tuned(1)
    patch = wl.diff(before, after)
    assert set(patch.records) - {EMBED, HEAD} == {PROJ} and patch.header.requires == []
    result = wl.apply(before, patch)
    assert result.keys() == before.keys()
    for name in result:
        expected = weights(1)[1] if name == PROJ else weights(1)[0]
        assert torch.equal(result[name], expected), name


@pytest.mark.parametrize("kind", [once, twice, tied])
def test_the_fingerprint_is_of_what_is_stored(kind: object, tmp_path: Path) -> None:
    assert callable(kind)
    save_file(once(1), tmp_path / "tuned.safetensors")
    if kind is tied:
        torch.save(tied(), tmp_path / "base.pt")
        base = tmp_path / "base.pt"
    else:
        save_file(kind(), tmp_path / "base.safetensors")
        base = tmp_path / "base.safetensors"
    patch = wl.diff(base, tmp_path / "tuned.safetensors")
    assert patch.header.base.fingerprint == wl.verify(base).identity
    assert patch.header.result is not None
    assert patch.header.result.fingerprint == wl.verify(tmp_path / "tuned.safetensors").identity


def test_a_head_that_came_loose_is_a_difference() -> None:
    loose = once(1) | {HEAD: weights(2)[0]}
    with pytest.raises(NamesMismatchError) as caught:
        wl.diff(once(0), loose)
    assert caught.value.offenders == (f"{HEAD} F32[30, 20]: only in state dict",)
    both = wl.diff(tied(0), loose)
    assert set(both.records) == {EMBED, HEAD, PROJ}


def test_two_ties_shown_under_common_names() -> None:
    embed, proj = weights()
    base = MemorySource({"a": embed, "b": embed, PROJ: proj})  # stored as a
    tuned = MemorySource({"b": embed, "c": embed, PROJ: proj})  # stored as b
    shown_base, shown_tuned = aligned(base, tuned)
    assert set(shown_base.specs) == set(shown_tuned.specs) == {"b", PROJ}
    assert stored_name(shown_base, "b") == "a" and stored_name(shown_tuned, "b") == "b"
    assert dict(shown_base.aliases) == {"a": "b"}
    raw = torch.empty(8, dtype=torch.uint8)
    shown_base.read("b", 4, raw)
    assert torch.equal(raw.view(torch.float32), embed.reshape(-1)[1:3])


def test_nothing_is_wrapped_without_need() -> None:
    base, tuned = MemorySource(once()), MemorySource(tied())
    other = MemorySource(once(1))
    assert aligned(base, other)[0] is base and aligned(base, other)[1] is other
    assert aligned(base, tuned)[0] is base and aligned(base, tuned)[1] is not tuned


def test_every_misfit_is_listed() -> None:
    base = {
        "a": torch.zeros(3),
        "b": torch.zeros(2, 2),
        "c": torch.zeros(4),
        "rows": torch.zeros(2, 3),
        "x": torch.ones(1),
    }
    tuned = {
        "a": torch.zeros(3, dtype=torch.int32),
        "b": torch.zeros(2, 3),
        "d": torch.zeros(4),
        "rows": torch.zeros(5, 3),
        "x": torch.ones(1),
    }
    with pytest.raises(NamesMismatchError) as caught:
        wl.diff(base, tuned)
    assert caught.value.offenders == (
        "a: dtype F32 against I32",
        "b: shape [2, 2] against [2, 3]",
        "c F32[4]: only in state dict",
        "d F32[4]: only in state dict",
        "rows: shape [2, 3] against [5, 3] (rows appended)",
    )
    assert caught.value.exit_code == 4
    with pytest.raises(NamesMismatchError) as fewer:
        wl.diff(base, tuned, allow=["added", "removed", "rows"])
    assert len(fewer.value.offenders) == 2


def test_the_remedy_names_what_would_allow_it() -> None:
    with pytest.raises(NamesMismatchError, match="--allow added --allow rows"):
        wl.diff({"r": torch.zeros(2, 2)}, {"r": torch.zeros(3, 2), "n": torch.zeros(1)})


def test_real_misfits_in_one_error(chgnet_safetensors: dict[str, Path]) -> None:
    with reading(chgnet_safetensors["0.2.0"]) as old, reading(chgnet_safetensors["0.3.0"]) as new:
        with pytest.raises(NamesMismatchError) as caught:
            match_sources(old, new, ())
        listed = {line.split(":")[0].split(" ")[0] for line in caught.value.offenders}
        differing = {n for n in {*old.specs, *new.specs} if old.specs.get(n) != new.specs.get(n)}
        assert listed == differing and len(listed) == len(caught.value.offenders) > 10
