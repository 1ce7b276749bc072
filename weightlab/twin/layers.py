"""What a layer gives when every sample of a batch has its own mixture of the experts' parts.

A layer that is linear in its weights gets the mixture as an addition to what it gives already: for nn.Linear

    y + Σₜ wₜ·(leftₜ (rightₜ x) + biasₜ)

which is what merged weights would give (arXiv 2406.15479, section 3.4, needs one merged model a sample instead). What
a layer's class is does not count, but whether its `forward` is the one that is known here. All others are asked once
for each sample with merged weights, or with all samples' at a time where these are vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from weightlab.errors import MisfitError
from weightlab.twin.parts import Parts

_PLACES = frozenset(("attn_mask",))
"""Arguments that are about places, and the same for all samples, though there may be as many places as samples."""

Mixture = Mapping[str, Parts]
"""{the layer's own name of a tensor: what experts add to it}."""
Addition = Callable[[Any, Mixture, Tensor, Tensor, Tensor], Tensor]
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


def _linear(layer: Any, parts: Mixture, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
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


def _conv1d(layer: Any, parts: Mixture, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    return _affine(parts, weights, given, output, transposed=True)


def _affine(parts: Mixture, weights: Tensor, given: Tensor, output: Tensor, *, transposed: bool) -> Tensor:
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
    """Whether it is a guess, by `_embedding` and `_sliced`, which rows of these arguments are whose."""
    shapes = [tuple(value.shape) for value in given if isinstance(value, Tensor)]
    return samples > 1 and any(shape in ((samples,), (samples, samples)) for shape in shapes)


def are_places(given: Tensor) -> bool:
    """Whether numbers [n] are 0 to n - 1."""
    return torch.equal(given, torch.arange(len(given), device=given.device).to(given))


def _embedding(layer: Any, parts: Mixture, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
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


def _convolution(layer: Any, parts: Mixture, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
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


def _layer_norm(layer: nn.LayerNorm, parts: Mixture, weights: Tensor, given: Tensor, output: Tensor) -> Tensor:
    if len(given) == 1 < len(weights):  # one input for all
        output = output.expand(len(weights), *output.shape[1:])
    plain = functional.layer_norm(given, layer.normalized_shape, None, None, layer.eps)
    if "weight" in parts:
        vectors = _spread(parts["weight"].vectors(weights), plain)
        output = torch.addcmul(output, plain, vectors, out=output if _is_own(output, plain) else None)
    return _with_vector(parts.get("bias"), weights, output)


def addition(layer: nn.Module, parts: Mixture) -> Addition | None:
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


def again(
    layer: nn.Module,
    parts: Mixture,
    weights: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    for_sample: Callable[[int], Any],
    name: str,
) -> Any:
    """What a layer gives with merged weights, sample by sample; of vectors for all samples at a time.

    Args:
        weights: [samples, T].
        for_sample: a context manager in which layers inside this one take the mixture of one sample.
    """
    state: dict[str, Tensor] = dict(layer.named_parameters()) | dict(layer.named_buffers())
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    rows = len(tensors[0]) if tensors else 0
    alone = not kwargs and len(args) == 1 and not any(True for _ in layer.children())
    if alone and rows and all(state[n].ndim == 1 for n in parts):
        own = of_rows(weights, max(rows, len(weights)), name)
        merged = {n: state[n] + part.vectors(own).to(state[n].dtype) for n, part in parts.items()}
        given = args[0].expand(max(rows, len(weights)), *args[0].shape[1:])
        rest = {n: t for n, t in state.items() if n not in parts}
        if isinstance(layer, _BatchNorm):  # which under vmap does not take 16 bits beside 32, as it does under autocast
            given = given.to(next(iter(merged.values())).dtype)
        found = vmap(lambda m, x: functional_call(layer, {**rest, **m}, (x[None],))[0])(merged, given)
        return found.to(args[0].dtype) if isinstance(layer, _BatchNorm) else found
    if len(weights) == 1:
        return functional_call(layer, _merged(state, parts, weights[0]), args, kwargs)
    cached = [key for key, value in kwargs.items() if hasattr(value, "get_seq_length")]
    if isinstance(layer, nn.MultiheadAttention):
        _require_samples_first(layer, args, kwargs, name)
    if not rows or cached:
        what = f"takes {cached[0]}, which holds all samples" if cached else "takes no tensor that has samples"
        raise MisfitError(f"{name}: {what}", "route by group (group=True), or one sample at a time")
    found = []
    for sample, own in enumerate(weights):
        mine = (_sliced(value, sample, len(weights), tensors[0], name) for value in args)
        named = {
            key: value if key in _PLACES else _sliced(value, sample, len(weights), tensors[0], name)
            for key, value in kwargs.items()
        }
        with for_sample(sample):
            found.append(functional_call(layer, _merged(state, parts, own), tuple(mine), named))
    return _together(found, name)


def _require_samples_first(
    layer: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> None:
    """Raises:
    MisfitError: its inputs do not lie as samples, places, features; or its masks are not for all samples alike.
    """
    mask = args[5] if len(args) > 5 else kwargs.get("attn_mask")
    if not layer.batch_first or args[0].ndim != 3 or (mask is not None and (mask.ndim != 2 or len(args) > 5)):
        raise MisfitError(
            f"{name}: an attention whose samples do not come first, or with a mask for each of them",
            "route by group (group=True), or one sample at a time",
        )


def _merged(state: Mapping[str, Tensor], parts: Mixture, weights: Tensor) -> dict[str, Tensor]:
    return {n: (state[n] + part.mixed(weights.float(), state[n].shape)).to(state[n].dtype) for n, part in parts.items()}


def _sliced(value: Any, sample: int, samples: int, first: Tensor, name: str) -> Any:
    """One sample's rows of an argument that has rows for all.

    What has one dimension is about samples, unless there are as many places.

    Args:
        first: the first argument, which has rows for all.
    """
    rows = len(first)
    if isinstance(value, tuple | list):
        return type(value)(_sliced(each, sample, samples, first, name) for each in value)
    if isinstance(value, Mapping):
        return _like(value, {key: _sliced(each, sample, samples, first, name) for key, each in value.items()})
    if not isinstance(value, Tensor) or not value.ndim or len(value) != rows or rows == 1:
        return value
    if value.ndim == 1 and rows in first.shape[1:2]:
        return value
    if rows % samples:
        raise MisfitError(
            f"{name}: {rows} rows for {samples} samples, so that samples cannot be told apart",
            "route by group (group=True), or one sample at a time",
        )
    each = rows // samples
    return value[sample * each : (sample + 1) * each]


def _together(found: list[Any], name: str) -> Any:
    """What each sample gave, as one batch.

    Raises:
        MisfitError: it is nothing that has rows.
    """
    first = found[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(found)
    if isinstance(first, tuple | list):
        return type(first)(_together(list(each), name) for each in zip(*found, strict=True))
    if isinstance(first, Mapping):
        return _like(first, {key: _together([each[key] for each in found], name) for key in first})
    if first is None or isinstance(first, bool | int | float | str):
        return first
    raise MisfitError(
        f"{name} gives a {type(first).__name__}, which holds all samples",
        "route by group (group=True), or one at a time",
    )


def _like(first: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """A mapping of that class, a dict or an output of transformers."""
    made: Any = type(first)
    return made(**values)
