"""What rounding does where numbers or products have few bits, and what it does not excuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.twin.networks import Beside, Narrow, Quiet, Tied, Widened, noise
from tests.twin.test_model import CASES, WEIGHTS, logits, twin_of
from weightlab.errors import MisfitError
from weightlab.twin.model import TwinModel
from weightlab.twin.parts import Parts
from weightlab.twin.rounding import rounding_of_products


def test_16_bits_are_compared_too(tmp_path: Path) -> None:
    """A network without a part would be off by more than rounding."""
    module, twin = twin_of(Tied, tmp_path, "low_rank:4")
    with pytest.raises(MisfitError, match="in more ways than one"):
        TwinModel(module.bfloat16(), twin)(torch.arange(14).view(7, 2), weights=WEIGHTS)


def test_products_of_fewer_bits_than_numbers_have(tmp_path: Path) -> None:
    """What is rounded in them is not taken for a part that is left out; and such a part is still seen."""
    cpu = torch.device("cpu")
    assert rounding_of_products(torch.float32, cpu) < 1e-5 < 1e-3 < rounding_of_products(torch.bfloat16, cpu)
    for case in ("bert", "gpt2", "vit", "convolutions"):
        make, batch = CASES[case]
        module, twin = twin_of(make, tmp_path / case, "low_rank:4")
        meant = logits(TwinModel(module, twin)(**batch, weights=WEIGHTS))
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(TwinModel(module, twin)(**batch, weights=WEIGHTS))
            assert 1e-3 < rounding_of_products(torch.float32, cpu) < 0.05
        assert 1e-4 < float((found.float() - meant).norm() / meant.norm()) < 0.1
    module, twin = twin_of(lambda: Quiet(True), tmp_path / "quiet", "low_rank:4")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(MisfitError, match="without calling them"):
        TwinModel(module, twin)(noise(7, 24), weights=WEIGHTS)


def test_few_numbers_of_few_bits(tmp_path: Path) -> None:
    """What rounding does to one number may by chance be next to nothing."""
    for seed in range(30):
        module, twin = twin_of(lambda: Narrow(1), tmp_path / str(seed), "low_rank:4", 2)
        given = torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)).bfloat16()
        assert TwinModel(module.bfloat16(), twin)(given, weights=[0.5, 0.5]).shape == (1, 1)


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_a_part_of_few_bits_beside_others(tmp_path: Path, size: float) -> None:
    """Rounding in one output does not excuse another."""
    module, twin = twin_of(lambda: Beside(size), tmp_path, "low_rank:4")
    module.more.bfloat16()  # type: ignore[union-attr,operator]
    with pytest.raises(MisfitError, match="in more ways than one"):
        TwinModel(module, twin)(noise(7, 24), weights=WEIGHTS)


def test_what_was_looked_at_with_few_bits_is_looked_at_again(tmp_path: Path) -> None:
    module, twin = twin_of(lambda: Beside(0.1), tmp_path, "low_rank:4")
    model = TwinModel(module, twin)
    with torch.autocast("cpu", torch.bfloat16):
        model(noise(7, 24), weights=WEIGHTS)  # what is left out is less than rounding
    with pytest.raises(MisfitError, match="in more ways than one"):
        model(noise(7, 24), weights=WEIGHTS)
    model = TwinModel(module, twin).bfloat16()
    model(noise(7, 24).bfloat16(), weights=WEIGHTS)
    with pytest.raises(MisfitError, match="in more ways than one"):
        model.float()(noise(7, 24), weights=WEIGHTS)


def test_weights_are_mixed_with_all_their_bits_under_autocast(tmp_path: Path) -> None:
    vectors, half = torch.tensor([[-9.9], [0.3]]), torch.tensor([[1.0, 0.0]])
    part = Parts(dense=dict(enumerate(vectors)), stack=vectors)
    factors = Parts(torch.tensor([[-9.9]]), torch.ones(1, 1), torch.tensor([0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part.vectors(half), vectors[:1])
        assert torch.equal(factors.mixed(half[0], (1, 1)), vectors[:1])


def test_an_output_of_more_bits_than_the_weights(tmp_path: Path) -> None:
    module, twin = twin_of(Widened, tmp_path, "low_rank:4")
    assert TwinModel(module.bfloat16(), twin)(noise(7, 24).bfloat16(), weights=WEIGHTS).dtype == torch.float32
