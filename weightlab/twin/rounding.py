"""How far a network's output moves by rounding alone, where numbers or products have few bits.

Merging rounds the weights, and from there on every layer rounds otherwise. By how much outputs differ then hangs on the
network, so it is tried: with weights that are moved by a rounding each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.twin.merging import Held, merged, with_parts

_COARSE = 1e-4
_NUMBERS = 16
"""So many numbers an output has at least, over all trials, to know what is typical of it."""


def noise_of(
    module: nn.Module,
    layers: Held,
    weights: Tensor,
    given: Callable[[], list[Tensor]],
    outputs: Sequence[Tensor],
    numbers: int,
) -> list[Tensor]:
    """What each number of the outputs is moved by (the root of the mean square of trials), where products are coarse.

    Args:
        weights: one mixture [T], which is merged.
        given: the outputs as they are now.
        outputs: those of that mixture.
        numbers: how many the smallest of the outputs has.

    Returns:
        as many tensors as there are outputs; nothing where products are finer than 1e-4, relative.
    """
    roundings = _roundings(module, layers)
    if max(roundings, default=0.0) <= _COARSE:
        return []
    trials = -(-_NUMBERS // max(1, numbers))
    total = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in outputs]
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        with merged(module, layers, weights):
            for (tensor, _), rounding in zip(with_parts(module, layers), roundings, strict=True):
                signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
                tensor.data.add_(tensor.data * signs.to(tensor) * rounding)
            moved = given()
        for each, output, other in zip(total, outputs, moved, strict=True):
            if other.shape == output.shape:
                each.add_((other.to(each.dtype) - output).square_())
    return [each.div_(trials).sqrt_() for each in total]


def _roundings(module: nn.Module, layers: Held) -> list[float]:
    """How coarse products of each tensor with parts are."""
    measured: dict[tuple[torch.dtype, bool], float] = {}
    found = []
    for tensor, _ in with_parts(module, layers):
        kind = (tensor.dtype, tensor.ndim > 2)
        if kind not in measured:
            measured[kind] = rounding_of_products(tensor.dtype, tensor.device, convolution=tensor.ndim > 2)
        found.append(measured[kind])
    return found


def rounding_of_products(dtype: torch.dtype, device: torch.device, *, convolution: bool = False) -> float:
    """How far products of a dtype are from exact ones on a device, relative; at least the dtype's unit.

    Products of 32 bits may be taken of fewer: by TF32, by `torch.set_float32_matmul_precision`, under autocast. No one
    setting says so; numbers that are multiplied do.

    Args:
        convolution: those of convolutions, else of matrices.
    """
    unit = torch.finfo(dtype).eps
    if dtype.itemsize < 4:
        return unit
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 64, generator=generator).to(dtype)
    other = torch.randn(*((8, 8, 3, 3) if convolution else (64, 64)), generator=generator).to(dtype)

    def product(values: Tensor, other: Tensor) -> Tensor:
        return functional.conv2d(values.view(1, 8, 16, 32), other) if convolution else values @ other

    found = product(values.to(device), other.to(device)).cpu().double()
    with torch.autocast("cpu", enabled=False):
        exact = product(values.double(), other.double())
    return max(
        unit, 3 * float((found - exact).norm() / exact.norm())
    )  # a third comes out: roundings are of either sign
