"""One layer of a routed model."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.twin.again import again
from weightlab.twin.layers import addition, are_places, leaves_open, of_rows
from weightlab.twin.observing import input_width, right_vectors
from weightlab.twin.parts import Parts

if TYPE_CHECKING:
    from weightlab.twin.model import TwinModel


class Layer:
    """One layer with parts: a forward hook that adds to what it gives; or, for others, what is called in its place."""

    def __init__(self, owner: TwinModel, name: str, layer: Any, parts: dict[str, Parts]) -> None:
        self._owner, self._name, self.parts = owner, name, parts
        self._inside = False
        self._right: list[Tensor] | None = None

        add = addition(layer, parts)
        if add is not None:
            self._add = add
            layer.register_forward_hook(self, with_kwargs=True, prepend=True)
        else:
            self._layer, self._forward = layer, layer.forward
            # Under the signature that it has, by which arguments are told apart.
            layer.forward = wraps(layer.forward)(partial(self._instead))

    def forget(self) -> None:
        """Lets go of what was computed from the parts."""
        self._right = None

    def _instead(self, *args: Any, **kwargs: Any) -> Any:
        weights = self._owner._weights
        if weights is None or self._inside:
            return self._forward(*args, **kwargs)
        self._owner._asked.add(self._name)
        if leaves_open((*args, *kwargs.values()), len(weights)):
            self._owner._guessed.add((self._name, "rows"))
        self._inside = True
        try:
            return again(self._layer, self.parts, weights, args, kwargs, self._owner._for_sample, self._name)
        finally:
            self._inside = False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._owner._heard is not None:
            self._listen(layer, args)
        weights = self._owner._weights
        if weights is None:
            return None
        self._owner._asked.add(self._name)
        given = args[0] if args else next(iter(kwargs.values()))
        numbers = isinstance(layer, nn.Embedding) and given.ndim == 1
        shared = len(given) == 1 or numbers
        if numbers and leaves_open((given,), len(weights)):
            self._owner._guessed.add((self._name, "places" if are_places(given) else "labels"))
        rows = weights if shared else of_rows(weights, len(given), self._name)
        classes = next((part.classes for part in self.parts.values() if part.classes), None)
        if classes is None:
            return self._add(layer, self.parts, rows.to(output.dtype), given, output)
        # Classes of several classifiers have nothing in common: the one of the largest weight says which there are.
        said = rows.argmax(1)
        alone = functional.one_hot(said, rows.shape[1]).to(output.dtype)
        output = self._add(layer, self.parts, alone, given, output)
        every = output.shape[-1]  # of an expert that has no such classifier
        there = torch.tensor([classes.get(expert, every) for expert in said.tolist()], device=output.device)
        beyond = torch.arange(output.shape[-1], device=output.device) >= there.view(-1, *(1,) * (output.ndim - 1))
        return output.masked_fill(beyond, float("-inf"))

    def _listen(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes how far the input lies in each expert's right singular vectors."""
        part = self.parts.get("weight")
        if part is None or part.owner is None or isinstance(layer, nn.Embedding) or not args:
            return
        given: Tensor = args[0]
        if given.ndim < 2 or given.shape[-1] != input_width(layer):
            return
        if self._right is None:
            self._right = right_vectors(layer, part, len(self._owner.names))
        given = given.float()
        inside = torch.stack([(given @ vectors).square().sum(-1) for vectors in self._right], -1)
        assert self._owner._heard is not None
        self._owner._heard.append(inside / given.square().sum(-1, keepdim=True).clamp_min(1e-30))
