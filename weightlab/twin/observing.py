"""What a router looks at: pooled hidden states, and the directions that experts' parts listen to."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MisfitError
from weightlab.twin.parts import Parts

_NEAR, _NEAR_IN_16_BITS = 1e-3, 5e-2
"""Relative differences of a sample's output that are rounding, from sums that another number of rows goes through."""


def last_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The last hidden states [samples, ..., d] of a network, and the mask of what is no padding.

    Of transformers' networks those of the body (of the encoder, where there is one); images may come as
    [samples, d, height, width]. Of others what goes into the last linear layer.

    Raises:
        MisfitError: there is no such layer.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return _into_last_linear(module, args, kwargs), None
    network: Any = module
    body = network.get_encoder() if network.config.is_encoder_decoder else network.base_model
    known = inspect.signature(body.forward).parameters
    wanted = {name: value for name, value in kwargs.items() if name in known and name != "labels"}
    if "use_cache" in known and not network.config.is_encoder_decoder:
        wanted["use_cache"] = False
    hidden: Tensor = body(*args, **wanted).last_hidden_state
    return hidden, kwargs.get("attention_mask")


def _into_last_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise MisfitError(f"{type(module).__name__} has no linear layer to look into", "give weights by hand")
    seen: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    try:
        module(*args, **kwargs)
    finally:
        handle.remove()
    return seen[-1]


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over all but samples and features: [samples, d], fp32.

    Args:
        hidden: [samples, d], [samples, places, d] or [samples, d, height, width].
        mask: [samples, places]: 1 where there is something; counts where the places agree.
    """
    hidden = hidden.float()
    if hidden.ndim == 2:
        return hidden
    if hidden.ndim == 4:
        return hidden.mean((2, 3))
    if mask is None or tuple(mask.shape) != tuple(hidden.shape[:2]):
        return hidden.mean(1)
    share = mask.to(hidden)[..., None]
    return (hidden * share).sum(1) / share.sum(1).clamp_min(1)


def input_width(layer: Any) -> int:
    """How many features go into a linear layer; -1 for others."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return int(layer.weight.shape[0]) if type(layer).__name__ == "Conv1D" else -1


def right_vectors(layer: nn.Module, part: Parts, experts: int) -> list[Tensor]:
    """An orthonormal basis [d, rank] for each expert of what its part of a linear layer does not map to zero."""
    assert part.left is not None and part.right is not None and part.owner is not None
    inner = part.right.T if isinstance(layer, nn.Linear) else part.left
    found = []
    for expert in range(experts):
        columns = inner[:, part.owner == expert].float()
        found.append(torch.linalg.qr(columns).Q if columns.shape[1] else columns)
    return found


def require_no_say(
    module: nn.Module,
    layers: Mapping[str, Mapping[str, Parts]],
    asked: Collection[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Makes sure that layers with parts which were not called have no say in what a network gives.

    A network can use a layer's weights without calling it; then its parts would be left out in silence. So the weights
    of such layers, unless they are also those of one that was called, become NaN for one more pass.

    Args:
        layers: {layer: {its name of a tensor: what experts add to it}}.
        asked: those that were called.

    Raises:
        MisfitError: lists those layers, of which one at least has a say.
    """
    tensors: dict[str, list[Tensor]] = {}
    for name, parts in layers.items():
        layer = module.get_submodule(name)
        state = dict(layer.named_parameters()) | dict(layer.named_buffers())
        tensors[name] = [state[own] for own in parts if state[own].is_floating_point()]
    known = {id(tensor) for name in asked for tensor in tensors[name]}
    silent = {n: [t for t in own if id(t) not in known] for n, own in tensors.items() if n not in asked}
    silent = {name: own for name, own in silent.items() if own}
    if not silent:
        return
    changed = [tensor.data for own in silent.values() for tensor in own]
    before = [tensor.clone() for tensor in changed]
    try:
        for tensor in changed:
            tensor.fill_(float("nan"))
        found = [t for t in _tensors_in(module(*args, **kwargs)) if t.is_floating_point()]
    finally:
        for tensor, values in zip(changed, before, strict=True):
            tensor.copy_(values)
    if any(bool(torch.isnan(tensor).any()) for tensor in found):
        raise MisfitError(
            f"{type(module).__name__} uses layers without calling them, so their parts cannot be added",
            "merge the parts: weightlab apply, or wl.patched",
            list(silent),
        )


def require_apart(
    module: nn.Module,
    mixing: Callable[[Tensor], AbstractContextManager[None]],
    weights: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Makes sure that what the first sample gives does not hang on the weights of others.

    It would if a layer's rows were other samples' than they are taken for: where places come before samples, say, and
    are as many, which no shape tells.

    Args:
        weights: [samples, T], two samples or more.

    Raises:
        MisfitError: it does.
    """
    other = weights.clone()
    other[1:] += 0.5
    found = []
    for each in (weights, other):
        with mixing(each):
            found.append([_first_rows(t, len(weights)) for t in _tensors_in(module(*args, **kwargs))])
    for one, two in zip(*found, strict=True):
        if one.shape != two.shape or not one.is_floating_point():
            continue
        both = one.isfinite() & two.isfinite()
        apart, length = (one - two)[both].double().norm(), one[both].double().norm()
        near = _NEAR if torch.finfo(one.dtype).eps < 1e-5 else _NEAR_IN_16_BITS
        if float(apart) > near * float(length):
            raise MisfitError(
                f"{type(module).__name__}: what one sample gives hangs on the others' weights, so that samples cannot "
                "be told apart",
                "route by group (group=True), or one sample at a time; if samples of a batch are meant to be compared: "
                "independent=False",
            )


def _first_rows(tensor: Tensor, samples: int) -> Tensor:
    """Those of the first sample; nothing of a tensor that does not have a number of rows for each."""
    rows = len(tensor) // samples if tensor.ndim and len(tensor) % samples == 0 else 0
    return tensor[:rows]


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of what a network gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)
