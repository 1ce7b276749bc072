"""Routed inference: one shared model in memory, and for every sample its own mixture of the experts' parts."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MisfitError, UsageError
from weightlab.ops.operands import PathLike
from weightlab.stream.executor import Resources
from weightlab.twin.checking import require_merged
from weightlab.twin.folder import Twin, open_twin
from weightlab.twin.layer import Layer
from weightlab.twin.loading import fill, shared_module
from weightlab.twin.mixture import mixture_of
from weightlab.twin.observing import last_hidden, pooled
from weightlab.twin.parts import Parts, parts_on
from weightlab.twin.routers import Observed
from weightlab.twin.routing import open_router

_WITHOUT_SAMPLES = ("relative_attention_bias",)
"""Layers (of T5 and its like) that are asked about places, once for all samples: what has them is asked anew."""


class TwinModel(nn.Module):
    """A shared model whose layers add, for every sample, a mixture of the experts' exclusive parts.

    What it gives is what the shared model would give with Σₜ wₜ·partₜ merged into it for each sample, up to rounding.
    Samples are the rows of the inputs, in order; rows that belong to one sample (beams) lie beside each other.

    The first batch, and those whose shapes leave open which rows are whose, are looked at: what the first and the last
    sample get is compared with what merged weights give, in three more passes, or five and more where numbers or
    products have 16 bits, for which the tensors that have parts are held twice. Threads take turns.

    Args:
        module: the shared model: the base with `twin.shared` on. It is in evaluation mode from now on.
        twin: the folder that the parts come from.
        independent: whether each sample's output hangs on no other sample, as it nearly always does. False for networks
            that compare the samples of a batch.
        checked: False: nothing is compared. For where there is no room, of networks that have been compared before.

    Attributes:
        module: the same.
        names: the experts, in the order of the weights.
        router: who is asked where no weights are given; None where the folder has none.

    Raises:
        NamesMismatchError, MisfitError: the parts do not fit the module; all misfits are listed.
        IntegrityError: parts are damaged.
    """

    def __init__(
        self,
        module: nn.Module,
        twin: Twin,
        *,
        independent: bool = True,
        checked: bool = True,
        resources: Resources | None = None,
    ) -> None:
        super().__init__()
        self.module = module.eval()
        self.twin = twin
        self.names = twin.names
        self._weights: Tensor | None = None
        self._heard: list[Tensor] | None = None
        self._asked: set[str] = set()
        self._independent, self._checked = independent, checked
        self._looked_at: set[tuple[Any, ...]] = set()
        self._guessed: set[tuple[str, str]] = set()
        self._turn = threading.RLock()
        self.router = open_router(twin)
        heads = {name for expert in twin.names for name in twin.heads(expert)}
        for patch in twin.exclusive.values():
            patch.verify(resources)
        found = parts_on(module, list(twin.exclusive.values()), heads)
        state = module.state_dict(keep_vars=True)
        layers: dict[str, dict[str, Parts]] = {}
        by_tensor = {id(state[name]): parts for name, parts in found.items()}
        for place, layer in module.named_modules():
            own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
            mine = {name: by_tensor[id(tensor)] for name, tensor in own if id(tensor) in by_tensor}
            owner, _, last = place.rpartition(".")
            inner = isinstance(module.get_submodule(owner), nn.MultiheadAttention)  # which never calls it
            if mine and (inner or last in _WITHOUT_SAMPLES):
                layers.setdefault(owner, {}).update({f"{last}.{name}": part for name, part in mine.items()})
            elif mine:
                layers.setdefault(place, {}).update(mine)
        self._layers = layers
        self._made = [Layer(self, place, module.get_submodule(place), mine) for place, mine in layers.items()]

    @classmethod
    def from_pretrained(
        cls,
        folder: PathLike,
        base: PathLike | None = None,
        *,
        architecture: str | None = None,
        dtype: torch.dtype | None = None,
        independent: bool = True,
        checked: bool = True,
        wait: float = 0.0,
        resources: Resources | None = None,
    ) -> TwinModel:
        """Loads a twin of transformers' models: the base, the shared part on it, the exclusive parts, the router.

        Args:
            base: where the base is now; None: where it was when the twin was made, from the folder.
            architecture: the class of transformers; None: the experts', else the base's.
            dtype: None: the base's.
            independent, checked: as for the class.

        Raises:
            MissingInputError, MalformedFileError, IntegrityError: see `open_twin`; or the base is not there.
            WrongBaseError: it is another than the twin was made from.
            NamesMismatchError: lists the tensors of the class that neither base nor experts have.
        """
        twin = open_twin(Path(folder))
        module = shared_module(twin, base, architecture, dtype, wait, resources or Resources())
        return cls(module, twin, independent=independent, checked=checked, resources=resources)

    @classmethod
    def over(
        cls,
        module: nn.Module,
        twin: Twin,
        base: PathLike | None = None,
        *,
        independent: bool = True,
        checked: bool = True,
        wait: float = 0.0,
        resources: Resources | None = None,
    ) -> TwinModel:
        """Loads a twin into a network of any kind, whatever weights that has.

        Args:
            module: its state dict has the names of the base's tensors, and of those that experts bring along.
            base, independent, checked: as for `from_pretrained`.

        Raises:
            NamesMismatchError: lists the tensors in which they differ; others as for `from_pretrained`.
        """
        fill(module, twin, base, wait, resources or Resources())
        return cls(module, twin, independent=independent, checked=checked, resources=resources)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where `to`, `cuda`, `half` and their like come together: the parts go with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in {id(part): part for mine in self._layers.values() for part in mine.values()}.values():
            part.apply(fn)  # once, also where a tied embedding and a head have the same
        for layer in self._made:
            layer.forget()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def forward(
        self,
        *args: Any,
        weights: Tensor | Sequence[Any] | None = None,
        top_k: int | None = None,
        group: bool = False,
        return_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What the module gives, every sample with its own mixture.

        Args:
            weights: [samples, T] or [T] for all; in the order of `names`.
            top_k: only so many experts of the largest weight, which are scaled to the same sum.
            group: one mixture for all samples, the mean of theirs.
            return_routing: (output, weights) instead of the output.
        """
        mixture = mixture_of(
            self.route(*args, **kwargs) if weights is None else weights, self.names, self.device, top_k, group
        )
        with self.mixing(mixture), torch.no_grad():
            output = self.module(*args, **kwargs)
        self._look(mixture, args, kwargs)
        return (output, mixture) if return_routing else output

    def generate(
        self,
        *args: Any,
        weights: Tensor | Sequence[Any] | None = None,
        top_k: int | None = None,
        group: bool = False,
        return_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The module's `generate`; the mixture of a prompt stays to the end of what is generated, for all its beams."""
        module: Any = self.module
        if args or "inputs" in kwargs:  # what `generate` calls inputs has the network's own name in its `forward`
            given, *others = (kwargs.pop("inputs"), *args) if "inputs" in kwargs else args
            args, kwargs = tuple(others), {module.main_input_name: given, **kwargs}
        if args:
            raise UsageError("only the inputs come without a name", "name the other arguments of generate")
        known = inspect.signature(module.forward).parameters
        prompt = {name: value for name, value in kwargs.items() if name in known}
        mixture = mixture_of(
            self.route(**prompt) if weights is None else weights, self.names, self.device, top_k, group
        )
        with self.mixing(mixture), torch.no_grad():
            output = module.generate(**kwargs)
        start = getattr(module.config, "decoder_start_token_id", None)
        if module.config.is_encoder_decoder and start is not None:
            ids = torch.full((len(prompt[module.main_input_name]), 1), start, device=self.device)
            prompt.setdefault("decoder_input_ids", ids)
        self._look(mixture, (), prompt)
        return (output, mixture) if return_routing else output

    def route(self, *args: Any, **kwargs: Any) -> Tensor:
        """The router's weights [samples, T] for a batch, of which the shared model makes one pass.

        Raises:
            UsageError: there is no router.
        """
        if self.router is None:
            raise UsageError("no weights, and no router to ask", "give weights, or train one: weightlab twin route")
        return self.router.weights(self.observe(*args, responses=self.router.wants_responses, **kwargs))

    def observe(self, *args: Any, responses: bool = False, **kwargs: Any) -> Observed:
        """What the shared model, without any expert, makes of a batch.

        Args:
            responses: also how far inputs of layers lie in the experts' right singular vectors.
        """
        with self.mixing(None), torch.no_grad():
            self._heard = [] if responses else None
            try:
                hidden, mask = last_hidden(self.module, args, kwargs)
                heard = self._heard
            finally:
                self._heard = None
        if heard is None:
            return Observed(pooled(hidden, mask))
        if not heard:
            raise UsageError("no linear layer has low-rank parts", "choose another router, or compress low_rank")
        each = [pooled(found, mask) for found in heard if len(found) == len(hidden)]
        if not each:
            raise MisfitError("no layer has its inputs in samples", "choose another router")
        return Observed(pooled(hidden, mask), torch.stack(each).mean(0))

    def _look(self, mixture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares with merged weights: the first batch, the first of several samples, and where rows were guessed."""
        guessed, self._guessed = frozenset(self._guessed), set()
        given = (*args, *kwargs.values())
        if not self._checked or any(hasattr(value, "get_seq_length") for value in given):
            return  # a cache would be filled once more
        shapes = [tuple(value.shape) for value in given if isinstance(value, Tensor)] if guessed else []
        # What is rounding to numbers or products of few bits may be a part that is left out to others.
        kind, dtype = self.device.type, next(self.module.parameters()).dtype
        products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        key = (len(mixture) > 1, guessed, dtype, products, *shapes)
        if key in self._looked_at:
            return
        with self._turn, torch.no_grad():
            require_merged(
                self.module,
                self._layers,
                self.mixing,
                (len(mixture), len(self.names)),
                self._asked,
                args,
                kwargs,
                independent=self._independent,
            )
        self._looked_at.add(key)
        self._guessed = set()

    @contextmanager
    def mixing(self, weights: Tensor | None) -> Iterator[None]:
        """For the length of a block the module takes these mixtures [samples, T]; None: it is the shared model.

        Other threads wait until it ends.
        """
        with self._turn:
            before, self._weights = self._weights, weights
            try:
                yield
            finally:
                self._weights = before

    def _for_sample(self, sample: int) -> Any:
        assert self._weights is not None
        return self.mixing(self._weights[sample : sample + 1])
