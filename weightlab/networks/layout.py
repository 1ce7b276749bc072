"""Which module of a network holds each tensor of its files, and whether LoRA can go there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from weightlab.errors import NamesMismatchError
from weightlab.networks.names import file_views

Kind = Literal["linear", "conv1d", "embedding", "convolution"]
"""`conv1d` is transformers' linear layer whose weight lies [in, out]."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the files is in the network; `kind` is None where LoRA cannot go."""

    name: str
    view: Tensor
    kind: Kind | None = None
    transposed: bool = False
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """The network's tensors, by its own names, and where the files' tensors lie in them.

    Attributes:
        tied: {module: modules whose weight is the same tensor}.
    """

    tensors: Mapping[str, Tensor]
    places: Mapping[str, Place]
    tied: Mapping[str, Mapping[str, Kind]]

    def module_tensors(self, name: str) -> list[str]:
        """All tensors of the module that has this one."""
        module = name.rpartition(".")[0]
        return [other for other in self.tensors if other.rpartition(".")[0] == module]

    def files(self, name: str) -> list[str]:
        """The files' tensors that lie in one of the network's."""
        return [file for file, place in self.places.items() if place.name == name]


def layout_of(network: nn.Module, wanted: Collection[str]) -> Layout:
    """The layout of a network, which may be without weights.

    Args:
        wanted: tensors of the files that must be there.

    Raises:
        NamesMismatchError: lists those that are not.
    """
    views = file_views(network)
    state = dict(network.state_dict(keep_vars=True))
    missing = [name for name in wanted if name not in views]
    if missing:
        raise NamesMismatchError(
            f"{type(network).__name__} lacks {len(missing)} tensors of the patch", "give the model it is for", missing
        )
    places: dict[str, Place] = {}
    for name, (owner, view) in views.items():
        tensor = state[owner]
        module, _, own = owner.rpartition(".")
        whole = tuple(view.shape) == tuple(tensor.shape) and view.stride() == tensor.stride()
        turned = tensor.ndim == 2 and tuple(view.shape) == tuple(tensor.T.shape) and view.stride() == tensor.T.stride()
        kind = _kind(network.get_submodule(module)) if own == "weight" and (whole or turned) else None
        places[name] = Place(owner, view, kind, turned and not whole, tuple(tensor.shape[2:]))
    owners: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if name.endswith(".weight"):
            owners.setdefault(id(tensor), []).append(name.rpartition(".")[0])
    tied = {
        module: {other: kind for other in group if other != module and (kind := _kind(network.get_submodule(other)))}
        for group in owners.values()
        for module in group
        if len(group) > 1
    }
    return Layout(state, places, tied)


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution" if module.groups == 1 else None
    return "conv1d" if type(module).__name__ == "Conv1D" else None
