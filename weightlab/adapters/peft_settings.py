"""An adapter's settings as a configuration of peft, for some of its modules."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from weightlab.adapters.config import AdapterConfig
from weightlab.adapters.patterns import matched
from weightlab.errors import MalformedFileError, UnsupportedFormatError

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
# What a parameter's size comes from: no large one is larger than every dimension of the adapter's tensors.
_SIZES = frozenset(
    (
        *("r", "init_r", "target_r", "n_frequency", "num_vectors", "vector_length", "theta_d_length", "u", "mini_r"),
        *("effective_rank", "hybrid_r", "gralora_k", "num_subspaces", "subspace_rank", "topk", "nblocks"),
    )
)
_SIZE_PATTERNS = ("rank_pattern", "n_frequency_pattern")
_SMALL = 4096
_ANY_SIZE = "LOKR"  # whose ranks may be huge: it takes whole matrices then


def peft_configuration(label: str, config: AdapterConfig, modules: Sequence[str], largest: int) -> Any:
    """peft's configuration, for just these modules.

    Args:
        largest: dimension of the adapter's tensors.

    Raises:
        UnsupportedFormatError: lists settings that this version of peft does not know, or it does not know the kind.
        MalformedFileError: lists settings that would make peft take room for more than the adapter has.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: dict[str, Any] = {str(kind.value): known for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if config.kind not in kinds:
        raise UnsupportedFormatError(
            f"{label}: the peft that is installed does not know {config.kind}", "pip install -U peft"
        )
    kind_of = kinds[config.kind]
    known = {part.name for part in dataclasses.fields(kind_of)} | set(inspect.signature(kind_of).parameters)
    given = {name: value for name, value in config.settings.items() if name not in _DROPPED}
    unknown = [f"{name} = {str(value)[:80]}" for name, value in given.items() if name not in known and value]
    if unknown:
        raise UnsupportedFormatError(
            f"{label}: this peft does not know these settings of {config.kind}",
            "merge it into its model with the peft that made it (merge_and_unload), then take a diff",
            unknown,
        )
    given = {name: value for name, value in given.items() if name in known}
    for name, value in given.items():
        if name.endswith("_pattern") and isinstance(value, dict):
            given[name] = _own_pattern(config.kind, modules, value)
    if "feedforward_modules" in given:
        listed = given["feedforward_modules"] or []
        given["feedforward_modules"] = [module for module in modules if _is_listed(module, listed)]
    if config.kind != _ANY_SIZE:
        _check_sizes(label, given, max(_SMALL, largest))
    return kind_of(target_modules=list(modules), **given)


def _check_sizes(label: str, given: Mapping[str, Any], largest: int) -> None:
    sizes = {name: value for name, value in given.items() if name in _SIZES}
    for name in _SIZE_PATTERNS:
        if isinstance(given.get(name), dict):
            sizes |= {f"{name}.{module}": size for module, size in given[name].items()}
    wrong = [f"{n} = {str(v)[:30]}" for n, v in sizes.items() if isinstance(v, int | float) and not -1 <= v <= largest]
    if wrong:
        raise MalformedFileError(
            f"{label}: its settings are larger than any of its tensors", "get the adapter again", wrong
        )


def _own_pattern(kind: str, modules: Sequence[str], pattern: Mapping[str, Any]) -> dict[str, Any]:
    """What a pattern says of these modules, under their very names."""
    if kind == "ADALORA":  # which ranks were kept, by parameter and not by pattern
        return {n: v for n, v in pattern.items() if any(n.startswith(f"{module}.") for module in modules)}
    nothing = object()
    found = {module: matched(pattern, module, nothing) for module in modules}
    return {module: value for module, value in found.items() if value is not nothing}


def _is_listed(module: str, names: Any) -> bool:
    if isinstance(names, str):
        return bool(matched({names: True}, module, False))
    return any(module == name or module.endswith(f".{name}") for name in names)
