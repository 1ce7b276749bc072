"""Parts merged into the weights of a module, for as long as a block takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.twin.parts import Parts

Held = Mapping[str, Mapping[str, Parts]]
"""{layer: {its name of a tensor: what experts add to it}}."""


@contextmanager
def merged(module: nn.Module, layers: Held, weights: Tensor) -> Iterator[None]:
    """For the length of a block the module's tensors are those of one mixture [T].

    Afterwards they are what they were, whatever is done to them in the block.
    """
    held = list(with_parts(module, layers))
    before = [tensor.detach().to("cpu", copy=True) for tensor, _ in held]
    try:
        for tensor, part in held:
            # Of classifiers of several sizes there is one at a time, as a layer has it.
            own = functional.one_hot(weights.argmax(), len(weights)).float() if part.classes else weights
            tensor.data.copy_(tensor.data + part.mixed(own, tensor.shape).to(tensor.device))
        torch.clear_autocast_cache()  # which would go on with 16-bit copies of what the weights were
        yield
    finally:
        for (tensor, _), values in zip(held, before, strict=True):
            tensor.data.copy_(values)
        torch.clear_autocast_cache()


def with_parts(module: nn.Module, layers: Held) -> Iterator[tuple[Tensor, Parts]]:
    """The module's tensors that have parts, each once."""
    seen: set[int] = set()
    for name, parts in layers.items():
        layer = module.get_submodule(name)
        state: dict[str, Tensor] = dict(layer.named_parameters()) | dict(layer.named_buffers())
        for own, part in parts.items():
            if id(state[own]) not in seen:
                seen.add(id(state[own]))
                yield state[own], part
