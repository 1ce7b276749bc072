"""Where the tensors that an adapter names lie in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.reading import fp32
from weightlab.networks.names import file_views
from weightlab.sources import Source


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of the network's tensors lies in the files.

    Attributes:
        shape: the network's tensor's; None: that of the files' tensor.
        view: which part of it the files' tensor is; None: all.
        tied: whether it has no name of its own there.
    """

    stored: str
    shape: tuple[int, ...] | None = None
    view: Tensor | None = None
    tied: bool = False


class Places:
    """Where the network's tensors lie in a checkpoint's files."""

    def __init__(self, base: Source, network: Callable[[], Any]) -> None:
        self._base = base
        self._stored = {**{name: name for name in base.specs}, **base.aliases}
        self._network = network
        self._made: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._views: dict[str, list[tuple[str, Tensor]]] = {}
        self._tied: dict[str, str] = {}
        self._inner: dict[str, list[str]] = {}  # names without their first part
        for name in base.specs:
            self._inner.setdefault(name.partition(".")[2], []).append(name)

    def of(self, name: str) -> list[Place]:
        """Its places; empty where there is none."""
        if name in self._stored:
            stored = self._stored[name]
            return [Place(stored, tied=stored != name)]
        self._make()
        views = self._views.get(name, [])
        if views and all(file in self._stored for file, _ in views):
            shape = self._shapes[name]
            whole = [tuple(view.shape) == shape and view.is_contiguous() for _, view in views]
            return [
                Place(self._stored[file], shape, None if all_of_it else view)
                for (file, view), all_of_it in zip(views, whole, strict=True)
            ]
        if name in self._tied:
            return [Place(self._tied[name], tied=True)]
        tail = name.partition(".")[2]
        while tail:  # a base that was saved without head has shorter names
            if tail in self._stored:
                return [Place(self._stored[tail])]
            tail = tail.partition(".")[2]
        longer = self._inner.get(name, [])  # and an adapter that was trained without head
        return [Place(longer[0])] if len(longer) == 1 else []

    def ends(self, stored: str) -> list[str]:
        """The network's names of one of the files' tensors: more than one where they are tied."""
        self._make()
        tied = {name for names in (self._base.aliases, self._tied) for name, own in names.items() if own == stored}
        return [stored, *sorted(tied)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one of the network's tensors; None where the checkpoint has none."""
        places = self.of(name)
        return None if not places else places[0].shape or self._base.specs[places[0].stored].shape

    def tensor(self, name: str) -> Tensor | None:
        """One of the network's tensors in fp32, put together where the files have it in parts; None: there is none."""
        places = self.of(name)
        if not places:
            return None
        if places[0].view is None:
            return fp32(self._base, places[0].stored)
        assert places[0].shape is not None
        whole = torch.zeros(places[0].shape)
        for place in places:
            assert place.view is not None
            view = place.view
            part = whole.as_strided(view.shape, view.stride(), view.storage_offset())
            part.copy_(fp32(self._base, place.stored))
        return whole

    def _make(self) -> None:
        if self._made is not None:
            return
        self._made = self._network() or torch.nn.Module()
        self._shapes = {name: tuple(t.shape) for name, t in self._made.state_dict(keep_vars=True).items()}
        for file, (owner, view) in file_views(self._made).items():
            self._views.setdefault(owner, []).append((file, view))
        every = list(self._made.named_parameters(remove_duplicate=False))
        stored = {id(parameter): self._stored[name] for name, parameter in every if name in self._stored}
        self._tied = {name: stored[id(p)] for name, p in every if name not in self._stored and id(p) in stored}
