"""Layers of which is not known how to add a mixture to what they give.

They are asked once for each sample with merged weights, or with all samples' at a time where these are vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase

from weightlab.errors import MisfitError
from weightlab.twin.layers import OwnParts, of_rows

_PLACES = frozenset(("attn_mask",))
"""Arguments that are about places, and the same for all samples, though there may be as many places as samples."""


def again(
    layer: nn.Module,
    parts: OwnParts,
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
        if isinstance(layer, _NormBase):  # which under vmap does not take 16 bits beside 32, as it does under autocast
            given = given.to(next(iter(merged.values())).dtype)
        found = vmap(lambda m, x: functional_call(layer, {**rest, **m}, (x[None],))[0])(merged, given)
        return found.to(args[0].dtype) if isinstance(layer, _NormBase) else found
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


def _merged(state: Mapping[str, Tensor], parts: OwnParts, weights: Tensor) -> dict[str, Tensor]:
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
        MisfitError: it is nothing that has rows, nor the same for all.
    """
    first = found[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(found)
    if isinstance(first, tuple | list):
        return type(first)(_together(list(each), name) for each in zip(*found, strict=True))
    if isinstance(first, Mapping):
        return _like(first, {key: _together([each[key] for each in found], name) for key in first})
    if first is None or (isinstance(first, bool | int | float | str) and all(each == first for each in found)):
        return first
    raise MisfitError(
        f"{name} gives a {type(first).__name__}, which holds all samples",
        "route by group (group=True), or one at a time",
    )


def _like(first: Mapping[str, Any], values: dict[str, Any]) -> Any:
    """A mapping of that class, a dict or an output of transformers."""
    made: Any = type(first)
    return made(**values)
