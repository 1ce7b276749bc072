"""What a layer gives when every sample of a batch has its own mixture of the experts' parts.

A layer that is linear in its weights gets the mixture as an addition to what it gives already: for nn.Linear

    y + Σₜ wₜ·(leftₜ (rightₜ x) + biasₜ)

which is what merged weights would give (arXiv 2406.15479, section 3.4, needs one merged model a sample instead). What
a layer's class is does not count, but whether its `forward` is the one that is known here. All others are in `again`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.errors import MisfitError
from weightlab.twin.parts import Parts

OwnParts = Mapping[str, Parts]
"""{the layer's own name of a tensor: what experts add to it}."""
Addition = Callable[[Any, OwnParts, Tensor, Tensor, Tensor], Tensor]
"""(layer, parts, weights [rows, T], input, output) to the output with the mixture."""


def of_rows(weights: Tensor, rows: int, layer: str) -> Tensor:
    """The weights of every row of a tensor that has a whole number of rows for each sample, in the samples' order.

    Raises:
        MisfitError: it has not; names the layer.
    """
    samples = len(weights)
    if rows == samples or samples == 1:
        return weights.expand(rows, -1) if samples == 1 else weights
    if rows % samples:
        raise MisfitError(
            f"{layer}: {rows} rows for {samples} samples, so that samples cannot be told apart",
            "route by group (group=True), or one sample at a time",
        )
    return weights.repeat_interleave(rows // samples, 0)


def _spread(weights: Tensor, like: Tensor, last: bool = True) -> Tensor:
    """Weights [rows, C] for a tensor [rows, ..., C], or where the features are not last, [rows, C, ...]."""
    between = (1,) * (like.ndim - 2)
    return weights.view(len(weights), *between, -1) if last else weights.view(len(weights), -1, *between)


def _linear(layer: Any, parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    return _affine(parts, weights, given, output, transposed=False)


def _is_own(output: Tensor, added: Tensor) -> bool:
    """Whether a sum may be kept where a layer's output is: nobody else has that memory, and nobody needs gradients."""
    return output.is_contiguous() and output.dtype == added.dtype and not torch.is_grad_enabled()


def _with_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """output + left @ right, in one pass over the output [..., n] where that is allowed."""
    if not (_is_own(output, left) and left.dtype == right.dtype):
        return output + left @ right
    output.view(-1, output.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right)
    return output


def _conv1d(layer: Any, parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    return _affine(parts, weights, given, output, transposed=True)


def _affine(parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor, *, transposed: bool) -> Tensor:
    if len(given) == 1 < len(weights):  # one input for all
        output = output.expand(len(weights), *output.shape[1:])
    matrix = parts.get("weight")
    if matrix is not None:
        if matrix.left is not None and matrix.right is not None and matrix.owner is not None:
            inner, outer = (matrix.left.T, matrix.right.T) if transposed else (matrix.right, matrix.left)
            hidden = functional.linear(given, inner)
            output = _with_product(output, hidden * _spread(weights[:, matrix.owner], hidden), outer.T)
        for expert, delta in matrix.dense.items():
            own = partial(functional.linear, weight=delta.T if transposed else delta)
            output = _with_share(weights[:, expert], given, own, output)
    return _with_vector(parts.get("bias"), weights, output)


def _with_share(share: Tensor, given: Tensor, function: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Adds what one expert gives, for those rows [rows] that have a share of it."""
    if len(given) == 1 < len(share):
        return output + _spread(share[:, None], output) * function(given)
    rows = torch.nonzero(share)[:, 0]
    if not len(rows):
        return output
    found = function(given[rows])
    return output.index_add(0, rows, _spread(share[rows][:, None], found) * found)


def _with_vector(part: Parts | None, weights: Tensor, output: Tensor, *, last: bool = True) -> Tensor:
    if part is None:
        return output
    vectors = _spread(part.vectors(weights), output, last).to(output.dtype)  # autocast makes them differ
    return output.add_(vectors) if _is_own(output, vectors) else output + vectors


def leaves_open(given: Iterable[Any], samples: int) -> bool:
    """Whether it is a guess, by `_embedding` and by `again`, which rows of these arguments are whose."""
    shapes = [tuple(value.shape) for value in given if isinstance(value, Tensor)]
    return samples > 1 and any(shape in ((samples,), (samples, samples)) for shape in shapes)


def are_places(given: Tensor) -> bool:
    """Whether numbers [n] are 0 to n - 1."""
    return torch.equal(given, torch.arange(len(given), device=given.device).to(given))


def _embedding(layer: Any, parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    if given.ndim > 1:
        return _embedded(parts["weight"], weights, given, output)
    if len(weights) == 1:
        return _embedded(parts["weight"], weights, given[None], output[None])[0]
    if len(given) == len(weights) and not are_places(given):  # a label of each sample
        return _embedded(parts["weight"], weights, given[:, None], output[:, None])[:, 0]
    return _embedded(parts["weight"], weights, given[None], output[None])  # places that all samples share


def _embedded(matrix: Parts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    if len(given) == 1 < len(weights):
        output = output.expand(len(weights), *output.shape[1:])
    if matrix.left is not None and matrix.right is not None and matrix.owner is not None:
        hidden = functional.embedding(given, matrix.left)
        output = output + (hidden * _spread(weights[:, matrix.owner], hidden)) @ matrix.right
    for expert, delta in matrix.dense.items():
        own = partial(functional.embedding, weight=delta)
        output = _with_share(weights[:, expert], given, own, output)
    return output


def _convolution(layer: Any, parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(layer.kernel_size)]

    def convolved(values: Tensor, kernel: Tensor) -> Tensor:
        found: Tensor = function(values, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return found

    matrix = parts.get("weight")
    if matrix is not None:
        if matrix.left is not None and matrix.right is not None and matrix.owner is not None:
            hidden = convolved(given, matrix.right.view(-1, *layer.weight.shape[1:]))
            mixed = hidden * _spread(weights[:, matrix.owner], hidden, last=False)
            output = output + torch.einsum("br...,or->bo...", mixed, matrix.left)
        for expert, delta in matrix.dense.items():
            output = _with_share(weights[:, expert], given, partial(convolved, kernel=delta), output)
    return _with_vector(parts.get("bias"), weights, output, last=False)


def _layer_norm(layer: nn.LayerNorm, parts: OwnParts, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    if len(given) == 1 < len(weights):  # one input for all
        output = output.expand(len(weights), *output.shape[1:])
    plain = functional.layer_norm(given, layer.normalized_shape, None, None, layer.eps)
    if "weight" in parts:
        vectors = _spread(parts["weight"].vectors(weights), plain)
        output = torch.addcmul(output, plain, vectors, out=output if _is_own(output, plain) else None)
    return _with_vector(parts.get("bias"), weights, output)


def addition(layer: nn.Module, parts: OwnParts) -> Addition | None:
    """How a layer gets the mixture added to its output; None where it has to be asked again with merged weights."""
    forward = type(layer).forward
    if forward is nn.Linear.forward:
        return _linear
    if forward is nn.Embedding.forward and isinstance(layer, nn.Embedding) and layer.max_norm is None:
        return _embedding
    if forward is nn.LayerNorm.forward and isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return _layer_norm
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        return _conv1d
    plain = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if forward in plain and getattr(layer, "padding_mode", "") == "zeros" and getattr(layer, "groups", 0) == 1:
        return _convolution
    return None
