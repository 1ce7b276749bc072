"""Adapters of the kinds that peft's own layers compute, one module at a time.

A network of empty modules gets the one module (or all that have tensors in the adapter, where they share parameters),
peft puts its layer there, loads the adapter's tensors and merges. Modules that wait for their turn have weights
without memory, so that there is one module's weight in memory at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.adapters.config import AdapterConfig, matched
from weightlab.adapters.kinds import THROUGH_PEFT, PeftKind
from weightlab.adapters.orientation import submodule
from weightlab.errors import MalformedFileError, MisfitError, UnsupportedFormatError, UsageError, WeightlabError
from weightlab.tensors.order import natural_key

_ADAPTER = "default"
_PREFIX = "base_model.model."
# How modules were chosen, what else is saved, where it ran: the keys of the file say the one, others read the rest.
_DROPPED = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern"),
        *("layers_to_transform", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
        *("revision", "runtime_config", "runtime_offload_base_weight", "target_modules", "target_parameters"),
        *("task_type", "trainable_token_indices", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        *("unsloth_fixed", "enable_lora", "merge_weights"),
    )
)


# Settings that a parameter's size comes from: no large one is larger than every dimension of the adapter's tensors.
_SIZES = frozenset(
    (
        *("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length", "theta_d_length", "u", "mini_r"),
        *("effective_rank", "hybrid_r", "gralora_k", "num_subspaces", "subspace_rank", "topk", "nblocks"),
    )
)
_SMALL = 4096
_ANY_SIZE = "LOKR"  # whose ranks may be huge: it takes whole matrices then


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

        configuration = self._configured(list(layers))
        self._check_sizes(configuration)
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

    def _configured(self, modules: list[str]) -> Any:
        """peft's configuration, for just these modules.

        Raises:
            UnsupportedFormatError: lists settings that this version of peft does not know.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind_of: Any = dict[str, Any](PEFT_TYPE_TO_CONFIG_MAPPING).get(self.config.kind)
        if kind_of is None:
            raise UnsupportedFormatError(
                f"{self.label}: the peft that is installed does not know {self.config.kind}", "pip install -U peft"
            )
        known = {part.name for part in dataclasses.fields(kind_of)} | set(inspect.signature(kind_of).parameters)
        given = {name: value for name, value in self.config.settings.items() if name not in _DROPPED}
        unknown = [f"{name} = {str(value)[:80]}" for name, value in given.items() if name not in known and value]
        if unknown:
            raise UnsupportedFormatError(
                f"{self.label}: this peft does not know these settings of {self.config.kind}",
                "merge it into its model with the peft that made it (merge_and_unload), then take a diff",
                unknown,
            )
        given = {name: value for name, value in given.items() if name in known}
        for name, value in given.items():
            if name.endswith("_pattern") and isinstance(value, dict):
                given[name] = self._own_pattern(modules, value)
        if "feedforward_modules" in given:
            listed = given["feedforward_modules"] or []
            given["feedforward_modules"] = [m for m in modules if _listed(m, listed)]
        return kind_of(target_modules=modules, **given)

    def _check_sizes(self, configuration: Any) -> None:
        """Before peft makes room for it.

        Raises:
            MalformedFileError: lists settings that are larger than anything in the adapter.
        """
        if self.config.kind == _ANY_SIZE:
            return
        tensors = [*self.shared.values(), *(t for own in self.modules.values() for t in own.values())]
        largest = max(_SMALL, *(size for tensor in tensors for size in tensor.shape))
        found: dict[str, Any] = {name: getattr(configuration, name, None) for name in sorted(_SIZES)}
        for name, value in vars(configuration).items():
            if name.endswith("_pattern") and isinstance(value, dict):
                found |= {f"{name}.{module}": size for module, size in value.items()}
        wrong = [f"{n} = {v}" for n, v in found.items() if isinstance(v, int | float) and not -1 <= v <= largest]
        if wrong:
            raise MalformedFileError(
                f"{self.label}: its settings are larger than any of its tensors",
                "get the adapter again",
                wrong,
            )

    def _own_pattern(self, modules: list[str], pattern: Mapping[str, Any]) -> dict[str, Any]:
        """What a pattern says of these modules, under their very names."""
        if self.config.kind == "ADALORA":  # which ranks were kept, by parameter and not by pattern
            return {n: v for n, v in pattern.items() if any(n.startswith(f"{module}.") for module in modules)}
        nothing = object()
        found = {module: matched(pattern, module, nothing) for module in modules}
        return {module: value for module, value in found.items() if value is not nothing}

    @contextmanager
    def _quietly(self, module: str) -> Iterator[None]:
        """peft's errors are about the adapter, its warnings for those who train; its random numbers are its own.

        Raises:
            MalformedFileError: it cannot be done.
        """
        told = logging.getLogger("peft")
        level = told.level
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
                warnings.simplefilter("ignore")
                told.setLevel(logging.ERROR)
                yield
        except WeightlabError:
            raise
        except ImportError as error:
            raise UsageError(f"{self.label}: {self.config.kind} needs a package more: {error}", "install it") from error
        except Exception as error:  # peft, torch and whatever they call raise bare ones
            raise MalformedFileError(
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


def _listed(module: str, names: Any) -> bool:
    if isinstance(names, str):
        return bool(matched({names: True}, module, False))
    return any(module == name or module.endswith(f".{name}") for name in names)


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
