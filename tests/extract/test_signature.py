"""Signatures against the formula in fp64, worked by hand and at random."""

from __future__ import annotations

import hashlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl
from weightlab.errors import MisfitError, NamesMismatchError, NonFiniteError, UsageError

State = dict[str, Tensor]


def models(seed: int = 0, dtype: torch.dtype = torch.float32, similar: float = 0.5) -> tuple[State, State, State]:
    """(pretrained, clean, robust) of a network with two convolutions, a BatchNorm and a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "features.0.weight": (6, 3, 3, 3),
        "features.0.bias": (6,),
        "features.1.weight": (6,),
        "features.1.bias": (6,),
        "features.1.running_mean": (6,),
        "features.1.running_var": (6,),
        "features.3.weight": (8, 6, 3, 3),
        "head.weight": (4, 8),
    }

    def moved(state: State, size: float) -> State:
        return {n: (t + size * torch.randn(t.shape, generator=generator)).to(dtype) for n, t in state.items()}

    start = moved({n: torch.zeros(s) for n, s in shapes.items()}, 1.0)
    clean = moved(start, 0.1)
    common = {n: start[n] + similar * (clean[n] - start[n]) for n in start}
    robust = moved(common, 0.1)
    for index, state in enumerate((start, clean, robust)):
        state["features.1.num_batches_tracked"] = torch.tensor(index)
    return start, clean, robust


def formula(start: Tensor, clean: Tensor, robust: Tensor) -> Tensor:
    """d − ⟨d, a⟩/⟨a, a⟩·a in fp64; the tensors may be flat and of several tensors."""
    a, d = clean.double() - start.double(), robust.double() - start.double()
    square = float((a * a).sum())
    return d if square == 0 else d - float((d * a).sum()) / square * a


def delta(patch: wl.Patch, name: str, shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    """A patch's Δ of one tensor."""
    zeros = {n: torch.zeros(r.shape, dtype=dtype) for n, r in patch.records.items()}
    return wl.apply(zeros, patch)[name].reshape(shape).double()


def test_by_hand() -> None:
    start, clean, robust = ({"layer.0.weight": torch.tensor(v)} for v in ([[1.0, 1.0]], [[4.0, 5.0]], [[2.0, 1.0]]))
    patch = wl.signature(start, clean, robust, encode="dense:fp32")  # a = (3, 4), d = (1, 0): 3/25 of a goes
    assert torch.allclose(
        delta(patch, "layer.0.weight", torch.Size((1, 2))), torch.tensor([[1 - 9 / 25, -12 / 25]]).double(), atol=1e-7
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
def test_random_tensors(seed: int, dtype: torch.dtype) -> None:
    start, clean, robust = models(seed, dtype)
    patch = wl.signature(start, clean, robust, encode="dense:fp64")
    assert set(patch.records) == {"features.0.weight", "features.0.bias", "features.3.weight", "head.weight"}
    for name in patch.records:
        right = formula(start[name], clean[name], robust[name])
        found = delta(patch, name, right.shape)
        a, d = (clean[name].double() - start[name].double()), (robust[name].double() - start[name].double())
        assert (found - right).norm() <= 1e-6 * d.norm()
        assert abs(float((found * a).sum())) <= 1e-6 * float(d.norm() * a.norm())


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_wider_scopes_are_one_projection_over_several_tensors(scope: str) -> None:
    start, clean, robust = models()
    patch = wl.signature(start, clean, robust, project=scope, layers="features*", encode="dense:fp64")
    groups = [["features.0.weight", "features.0.bias"], ["features.3.weight"]]
    for group in groups if scope == "layer" else [[*groups[0], *groups[1]]]:
        joined = [torch.cat([state[n].flatten() for n in group]) for state in (start, clean, robust)]
        found = torch.cat([delta(patch, n, start[n].shape).flatten() for n in group])
        assert torch.allclose(found, formula(*joined), atol=1e-7)
    assert patch.header.method.parameters["project"] == scope


def test_degenerate_tensors_are_finite_and_right() -> None:
    start = {"0.w": torch.ones(3), "1.w": torch.tensor(2.0), "2.w": torch.full((4, 4), 0.5), "3.w": torch.zeros(0, 3)}
    unmoved = {n: t.clone() for n, t in start.items()}
    robust = {n: t + torch.arange(t.numel()).reshape(t.shape) + 1.0 for n, t in start.items()}
    patch = wl.signature(start, unmoved, robust, encode="dense:fp32")  # a = 0: the signature is d
    for name in ("0.w", "1.w", "2.w"):
        assert torch.equal(delta(patch, name, start[name].shape), (robust[name] - start[name]).double())
    nothing = wl.signature(start, robust, robust, encode="dense:fp32")  # d = a: nothing is left
    assert not nothing.records
    single = wl.signature(start, {n: t * 3 for n, t in start.items()}, robust, encode="dense:fp32", layers="1")
    assert not single.records  # one element: all of it is along a


def test_statistics_of_norms_and_integers_are_left_alone_unless_asked_for() -> None:
    start, clean, robust = models()
    assert not any("features.1" in n for n in wl.signature(start, clean, robust).records)
    moved = [n for n in clean if n.startswith("features.1.") and "num" not in n]
    for norm, share in (("robust", 1.0), ("blend:0.25", 0.25)):
        patch = wl.signature(start, clean, robust, layers="first:1", norm=norm, encode="dense:fp32")
        result = wl.apply(clean, patch)
        for name in moved:
            assert torch.allclose(result[name], clean[name] + share * (robust[name] - clean[name]), atol=1e-6)
        assert torch.equal(result["features.1.num_batches_tracked"], clean["features.1.num_batches_tracked"])
        assert torch.equal(result["features.3.weight"], clean["features.3.weight"])  # not among the first layers
    measured = {n: torch.full_like(clean[n], 7.0) for n in moved if "running" in n}
    patch = wl.signature(start, clean, robust, norm="recalibrate", statistics=measured, encode="dense:fp32")
    result = wl.apply(clean, patch)
    assert torch.allclose(result["features.1.running_var"], torch.full((6,), 7.0))
    assert torch.allclose(result["features.1.weight"], robust["features.1.weight"], atol=1e-6)


def test_modes_that_make_no_sense() -> None:
    start, clean, robust = models()
    plain = [{"0.w": s["features.0.weight"]} for s in (start, clean, robust)]
    with pytest.raises(UsageError, match="running statistics"):
        wl.signature(*plain, norm="robust")
    with pytest.raises(UsageError, match="data"):
        wl.signature(start, clean, robust, norm="recalibrate")
    for norm in ("blend", "blend:2", "robust:1", "half"):
        with pytest.raises(UsageError, match="--norm"):
            wl.signature(start, clean, robust, norm=norm)
    with pytest.raises(UsageError, match="exact"):
        wl.signature(start, clean, robust, encode="exact")
    with pytest.raises(UsageError, match="--project"):
        wl.signature(start, clean, robust, project="row")


def test_only_the_chosen_tensors_must_fit(tmp_path: Path) -> None:
    start, clean, robust = models()
    start["head.weight"] = torch.zeros(9, 8)  # another head, as pretrained models have
    del robust["features.3.weight"]
    assert wl.signature(start, clean, robust, layers="first:1").records
    with pytest.raises(NamesMismatchError) as failed:
        wl.signature(start, clean, robust, tmp_path / "p.safetensors")
    assert [o.split(":")[0] for o in failed.value.offenders] == ["head.weight", "features.3.weight F32[8, 6, 3, 3]"]
    assert list(tmp_path.iterdir()) == []


def test_nan_is_an_error_that_names_the_tensor() -> None:
    start, clean, robust = models()
    robust["features.3.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError) as failed:
        wl.signature(start, clean, robust)
    assert failed.value.offenders == ("features.3.weight",)


def test_codes_of_a_quantised_checkpoint_have_no_signature() -> None:
    states = [
        {
            "0.weight": (torch.ones(4, 4) * i + torch.eye(4) * (i == 2)).to(torch.float8_e4m3fn),
            "0.weight_scale": torch.ones(1),
            "1.weight": torch.ones(4),
        }
        for i in range(3)
    ]
    with pytest.raises(MisfitError, match="requantising is not done") as failed:
        wl.signature(*states)
    assert failed.value.offenders[0] == "0.weight F8_E4M3[4, 4]: fp8 with scales, with weight_scale"
    for state in states:  # without its scale it is a tensor of floats like others
        del state["0.weight_scale"]
    assert "0.weight" in wl.signature(*states, layers="0").records


def test_two_on_one_model_and_off_again(tmp_path: Path) -> None:
    start, clean, robust = models()
    model = tmp_path / "model.safetensors"
    save_file(clean, model)
    first = hashlib.sha256(model.read_bytes()).hexdigest()
    noise = wl.signature(start, clean, robust, tmp_path / "noise.safetensors", encode="quantized:8")
    blur = wl.signature(start, clean, models(5)[2], tmp_path / "blur.safetensors", layers="first:1", norm="robust")
    wl.apply(model, [noise, 0.0 * blur], in_place=True)
    once = model.read_bytes()
    wl.remove(model, blur)
    assert model.read_bytes() == once  # at scale 0 it did nothing
    wl.apply(model, blur, in_place=True)
    wl.remove(model, noise)
    wl.remove(model, blur)
    assert hashlib.sha256(model.read_bytes()).hexdigest() == first
    assert not (tmp_path / ".weightlab").exists()


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    start, clean, robust = models()
    place = tmp_path / "p.safetensors"
    patch = wl.signature(start, clean, robust, place, layers="first:1", order=[*clean], base_name="me/clean")
    assert patch.header.kind == "signature"
    assert patch.header.method.name == "rws"
    assert patch.header.method.parameters == {
        "project": "tensor", "layers": ["features.0"], "order": "modules", "norm": "keep",
    }  # fmt: skip
    assert patch.header.base.name == "me/clean"
    assert wl.verify(place, base=clean).kind == "patch"
