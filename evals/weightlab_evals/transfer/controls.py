"""Bases on which a transfer has to fail: the same function in other coordinates, and no training at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

_HIDDEN, _NEURONS = "hidden", "neurons"
_LAYOUT: Mapping[str, tuple[str | None, ...]] = {
    # Llama: what each dimension of a tensor counts; the first that ends a name holds.
    "embed_tokens.weight": (None, _HIDDEN),
    "lm_head.weight": (None, _HIDDEN),
    "layernorm.weight": (_HIDDEN,),
    "model.norm.weight": (_HIDDEN,),
    "q_proj.weight": (None, _HIDDEN),
    "k_proj.weight": (None, _HIDDEN),
    "v_proj.weight": (None, _HIDDEN),
    "o_proj.weight": (_HIDDEN, None),
    "gate_proj.weight": (_NEURONS, _HIDDEN),
    "up_proj.weight": (_NEURONS, _HIDDEN),
    "down_proj.weight": (_HIDDEN, _NEURONS),
    # BERT.
    "embeddings.weight": (None, _HIDDEN),
    "LayerNorm.weight": (_HIDDEN,),
    "LayerNorm.bias": (_HIDDEN,),
    "query.weight": (None, _HIDDEN),
    "key.weight": (None, _HIDDEN),
    "value.weight": (None, _HIDDEN),
    "query.bias": (None,),
    "key.bias": (None,),
    "value.bias": (None,),
    "attention.output.dense.weight": (_HIDDEN, None),
    "attention.output.dense.bias": (_HIDDEN,),
    "intermediate.dense.weight": (_NEURONS, _HIDDEN),
    "intermediate.dense.bias": (_NEURONS,),
    "output.dense.weight": (_HIDDEN, _NEURONS),
    "output.dense.bias": (_HIDDEN,),
    "transform.dense.weight": (_HIDDEN, _HIDDEN),
    "transform.dense.bias": (_HIDDEN,),
    "decoder.weight": (None, _HIDDEN),
    "decoder.bias": (None,),
    "predictions.bias": (None,),
    "position_ids": (None, None),
}


def permuted(state: Mapping[str, Tensor], seed: int, what: tuple[str, ...] = (_HIDDEN, _NEURONS)) -> State:
    """The same function with its neurons in another order, as if it had been trained from another start.

    Args:
        state: of a Llama or a BERT.
        what: `hidden`, the coordinates that all layers share; `neurons`, those inside each block's feed-forward part.

    Raises:
        KeyError: a tensor of another kind.
    """
    orders: dict[tuple[str, str], Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def order(kind: str, block: str, count: int) -> Tensor:
        key = (kind, block if kind == _NEURONS else "")
        if key not in orders:
            orders[key] = torch.randperm(count, generator=generator)
        return orders[key]

    found: State = {}
    for name, tensor in state.items():
        block = ".".join(part for part in name.split(".") if part.isdigit())
        moved = tensor
        for dimension, kind in enumerate(_layout(name)):
            if kind in what:
                moved = moved.index_select(dimension, order(kind, block, moved.shape[dimension]))
        found[name] = moved.contiguous()
    return found


def reinitialised(module: nn.Module, seed: int) -> nn.Module:
    """A network of the same configuration, with weights that were never trained."""
    given: Any = module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = type(given)(given.config)
    return made.eval()


def _layout(name: str) -> tuple[str | None, ...]:
    for end, dimensions in _LAYOUT.items():
        if name == end or name.endswith((f".{end}", f"_{end}")):
            return dimensions
    raise KeyError(name)
