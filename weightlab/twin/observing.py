"""What a router looks at: pooled hidden states, and the directions that experts' parts listen to."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MisfitError
from weightlab.twin.parts import Parts


def last_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The last hidden states [samples, ..., d] of a network, and the mask of what is no padding.

    Of transformers' networks those of the body (of the encoder, where there is one); images may come as
    [samples, d, height, width]. Of others what goes into the linear layer that is called last.

    Prompts that are filled up on the left are seen from their own first place on, as `generate` has them.

    Raises:
        MisfitError: there is no such layer.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return _into_last_linear(module, args, kwargs), None
    network: Any = module
    body = network.get_encoder() if network.config.is_encoder_decoder else network.base_model
    known = inspect.signature(body.forward).parameters
    given = by_name(module, args, kwargs)
    wanted = {name: value for name, value in given.items() if name in known and name != "labels"}
    mask: Tensor | None = given.get("attention_mask")
    if "position_ids" in known and "position_ids" not in given and module.can_generate() and _left_padded(mask):
        assert mask is not None
        wanted["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    if "use_cache" in known and not network.config.is_encoder_decoder:
        wanted["use_cache"] = False
    hidden: Tensor = body(**wanted).last_hidden_state
    return hidden, mask


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a network's `forward` is given, under the names that it has there."""
    names = (n for n, p in inspect.signature(module.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _left_padded(mask: Tensor | None) -> bool:
    return mask is not None and mask.ndim == 2 and not bool(mask[:, 0].all())


def _into_last_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise MisfitError(f"{type(module).__name__} has no linear layer to look into", "give weights by hand")
    last: list[Tensor] = []

    def see(layer: nn.Module, given: tuple[Any, ...]) -> None:
        last[:] = [tensor for tensor in given if isinstance(tensor, Tensor)][:1] or last

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise MisfitError(f"{type(module).__name__} calls no linear layer to look into", "give weights by hand")
    return last[0]


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
