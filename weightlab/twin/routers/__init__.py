"""Who gets which mixture. One file a kind of router; each plug-in is a `ROUTER`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from weightlab.registry import Registry


@dataclass(frozen=True, slots=True)
class Observed:
    """What the shared model makes of a batch.

    Attributes:
        features: [samples, d], fp32: last hidden states, the mean over what is no padding.
        responses: [samples, T], fp32: how far inputs of layers lie in each expert's right singular vectors, the mean
            of ‖Vᵀx‖² / ‖x‖² over layers and what is no padding; None where the router does not want them.
    """

    features: Tensor
    responses: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Examples:
    """What a router is made from.

    Attributes:
        observed: of all samples, in one.
        labels: int64 [samples], the number of the expert that each is for.
        held_out: bool [samples]: not trained on; for the choice between checkpoints.
    """

    observed: Observed
    labels: Tensor
    held_out: Tensor


class RouterKind(Protocol):
    """A plug-in."""

    wants_responses: bool
    """Whether `Observed.responses` is needed."""

    def fit(self, examples: Examples, experts: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that are kept."""

    def fits(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], experts: int) -> bool:
        """Whether tensors and values that someone else wrote are what `fit` keeps for so many experts."""

    def weights(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], observed: Observed) -> Tensor:
        """[samples, T], fp32; each row sums to 1."""


ROUTERS: Registry[RouterKind] = Registry("weightlab.twin.routers", "ROUTER", "router")
