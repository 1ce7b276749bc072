"""Adapters of the kinds that peft's own layers compute, one module at a time.

A network of empty modules gets the one module (or all that have tensors in the adapter, where they share parameters),
peft puts its layer there, loads the adapter's tensors and merges. Modules that wait for their turn have weights
without memory, so that there is one module's weight in memory at a time.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.adapters.config import AdapterConfig
from weightlab.adapters.kinds import THROUGH_PEFT, PeftKind
from weightlab.adapters.orientation import submodule
from weightlab.adapters.peft_settings import peft_configuration
from weightlab.errors import MalformedFileError, MisfitError, UnsupportedFormatError, UsageError, WeightlabError
from weightlab.tensors.order import natural_key

_ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass(slots=True)
class PeftModules:
    """The modules of one adapter.

    Attributes:
        network: asks for the network, which is made once; it may be None.
        shared: what belongs to no module: {key: tensor}.
        modules: {the network's name of a module: {key: tensor}}; keys as peft saves them.
    """

    label: str
    config: AdapterConfig
    network: Callable[[], Any]
    shared: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _together: Any = None

    @property
    def kind(self) -> PeftKind:
        return THROUGH_PEFT[self.config.kind]

    def take(self, key: str, tensor: Tensor) -> bool:
        """Takes a tensor that is one of peft's parameters; says whether it is."""
        module, sign, _ = key.partition(f".{self.kind.prefix}")
        if key.startswith("base_model."):
            self.shared[key] = tensor
        elif sign:
            self.modules.setdefault(module, {})[_PREFIX + key] = tensor
        elif (found := self._saved_under_another_prefix(key)) is not None:
            self.modules.setdefault(found, {})[_PREFIX + key] = tensor
        else:
            return False
        return True

    def _saved_under_another_prefix(self, key: str) -> str | None:
        """RandLoRA and others keep copies of shared matrices in each module."""
        stem = self.kind.prefix.partition("_")[0] + "_"
        module, sign, _ = key.partition(f".{stem}")
        return module if sign else None

    def folds(self) -> dict[str, ModuleFold]:
        """{module: how it is merged}.

        Raises:
            UsageError: peft is not installed; or the network is needed and not known.
            MalformedFileError: peft's configuration does not take the adapter's.
        """
        if find_spec("peft") is None:
            raise UsageError(
                f"{self.label}: adapters of the kind {self.config.kind} are computed by peft",
                "pip install 'weightlab[peft]'",
            )
        if (self.kind.shared and not self.modules) or self.kind.ordered:
            self._order()
        return {module: ModuleFold(module, self.kind.changes, self) for module in self.modules}

    def _order(self) -> None:
        """The modules in the order of the network, where what they get depends on it or no key names them."""
        network = self.network()
        if network is None:
            raise UsageError(
                f"{self.label}: in adapters of the kind {self.config.kind} the order of the network's modules counts",
                "put it on a folder with the model's config.json",
            )
        if not self.modules:
            targets = self.config.settings.get("target_modules")
            if not isinstance(targets, list):
                raise UnsupportedFormatError(
                    f"{self.label}: which modules it is for depends on a search by peft (target_modules = {targets!r})"[
                        :300
                    ],
                    "merge it into its model with peft (merge_and_unload), then take a diff",
                )
            named = {
                name for name, module in network.named_modules() if isinstance(module, nn.Linear) or _turned(module)
            }
            chosen = [name for name in named if any(name == t or name.endswith(f".{t}") for t in targets)]
            self.modules = {name: {} for name in chosen}
        order = {name: place for place, (name, _) in enumerate(network.named_modules())}
        last = len(order)
        self.modules = dict(sorted(self.modules.items(), key=lambda m: (order.get(m[0], last), natural_key(m[0]))))

    def merged(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What peft makes of a module's tensors."""
        with self._quietly(module):
            return self._merged_together(module, tensors) if self.kind.shared else self._merged_alone(module, tensors)

    def _merged_alone(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self._made({module: self._layer(module, tensors)}, {**self.shared, **self.modules[module]})
        layer = made.merge_and_unload(progressbar=False).get_submodule(module)
        return _tensors(layer)

    def _merged_together(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One module after another gets its weight, is merged, and loses it again."""
        if self._together is None:
            state = dict(self.shared)
            for own in self.modules.values():
                state |= own
            layers = {name: self._layer(name, self._weightless(name, state)) for name in self.modules}
            self._together = self._made(layers, state)
        layer = self._together.base_model.model.get_submodule(module)
        base = layer.get_base_layer()
        kept = {name: getattr(base, name) for name in tensors}
        if tensors["weight"].shape != kept["weight"].shape:
            raise MisfitError(
                f"{self.label}: {module} is {list(tensors['weight'].shape)} in the model",
                f"it was trained on {list(kept['weight'].shape)}",
            )
        _fill(base, tensors)
        if self.config.kind == "FROD":  # whose basis of a module comes from the module's weight and the shared one
            weight = base.weight.T if layer.fan_in_fan_out else base.weight
            layer.frod_U[_ADAPTER], _ = layer._calculate_frod_u_and_lambda(layer.frod_V[_ADAPTER], weight)
        try:
            layer.merge()
            return {name: tensor.clone() for name, tensor in _tensors(base).items()}
        finally:
            layer.merged_adapters.clear()
            for name, tensor in kept.items():
                setattr(base, name, tensor)

    def _weightless(self, module: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a module's sizes that take no memory."""
        layer = submodule(self.network(), module)
        if layer is None:
            raise UsageError(
                f"{self.label}: modules share parameters of sizes that depend on all of them ({self.config.kind})",
                "put it on a folder with the model's config.json",
            )
        return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in layer.named_parameters(recurse=False)}

    def _layer(self, module: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The network's module with these tensors; without a network, one of a kind that has such a weight."""
        found = submodule(self.network(), module)
        if found is None:
            layer = _made_of(tensors, turned=bool(self.config.settings.get("fan_in_fan_out")))
        else:
            with torch.device("meta"):
                layer = copy.deepcopy(found).to("meta")
        _fill(layer, tensors)
        return layer

    def _made(self, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> Any:
        """A network of these modules with the adapter in it.

        Raises:
            MalformedFileError: lists tensors that are missing, too many, or of another shape.
        """
        from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

        own = (tensor for module in self.modules.values() for tensor in module.values())
        sizes = [size for tensor in (*self.shared.values(), *own) for size in tensor.shape]
        configuration = peft_configuration(self.label, self.config, list(layers), max(sizes, default=1))
        made = PeftModel(_network(layers), configuration, _ADAPTER)
        expected = get_peft_model_state_dict(made, save_embedding_layers=False)
        missing = [key for key in expected if key not in state]
        over = [key for key in state if key not in expected]
        if missing or over:
            raise MalformedFileError(
                f"{self.label}: its tensors are not those of a {self.config.kind} adapter of this configuration",
                "get the adapter again; or merge it with the version of peft that made it, then take a diff",
                [*(f"{key}: missing" for key in missing), *(f"{key}: unknown" for key in over)],
            )
        set_peft_model_state_dict(made, dict(state))
        return made.eval()

    @contextmanager
    def _quietly(self, module: str) -> Iterator[None]:
        """peft's errors are about the adapter, its warnings for those who train; its random numbers are its own.

        Raises:
            MisfitError: it cannot be done with this module.
        """
        told = logging.getLogger("peft")
        level = told.level
        try:
            with (
                warnings.catch_warnings(),
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                # Indices of SHiRA outside the weight would end the process.
                torch.sparse.check_sparse_tensor_invariants(),  # type: ignore[no-untyped-call]
            ):
                warnings.simplefilter("ignore")
                told.setLevel(logging.ERROR)
                yield
        except WeightlabError:
            raise
        except ImportError as error:
            raise UsageError(f"{self.label}: {self.config.kind} needs a package more: {error}", "install it") from error
        except Exception as error:  # peft, torch and whatever they call raise bare ones
            raise MisfitError(
                f"{self.label}: peft makes no {self.config.kind} layer of it: {' '.join(str(error).split())[:300]}",
                "give the model that it was trained on; or get the adapter again",
                [module],
            ) from error
        finally:
            told.setLevel(level)


@dataclass(frozen=True, slots=True)
class ModuleFold:
    """How one module of an adapter is merged; see `changes.Fold`."""

    module: str
    changes: tuple[str, ...]
    adapter: PeftModules

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"weight" or "bias": what it becomes}."""
        return self.adapter.merged(self.module, tensors)


def _network(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Empty modules in one another, with these at their places."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}


def _turned(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _made_of(tensors: Mapping[str, Tensor], *, turned: bool) -> nn.Module:
    """A module that has a weight of that shape."""
    shape = tuple(tensors["weight"].shape)
    bias = "bias" in tensors
    convolutions: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    with torch.device("meta"):
        if len(shape) == 2 and turned:
            from transformers.pytorch_utils import Conv1D

            kind: Any = Conv1D
            layer: nn.Module = kind(shape[1], shape[0])
            return layer
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=bias)
        if len(shape) in convolutions:
            made: nn.Module = convolutions[len(shape)](shape[1], shape[0], shape[2:], bias=bias)
            return made
    raise MisfitError(f"peft has no layer for a weight of the shape {list(shape)}", "give the model it was trained on")
