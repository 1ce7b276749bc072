"""`adapter_config.json`: which parts of it decide what an adapter does, and which cannot be computed here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightlab.adapters.patterns import Patterns, matched
from weightlab.errors import MalformedFileError, UnsupportedFormatError

CONFIG = "adapter_config.json"

# What does not change what a trained adapter does: how it was trained, or what the keys of its file say anyway.
_NEUTRAL = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("target_modules", "task_type"),
    )
)
_READ = frozenset(
    (
        *("alpha_pattern", "fan_in_fan_out", "lora_alpha", "target_parameters", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
    )
)
# These start from a base whose weights they change, so that the file alone does not say what the adapter is.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What is needed to compute an adapter's change.

    Attributes:
        tokens: indices of trained tokens; {end of the embedding's name: indices}, "" for the input embedding.
        base_name, revision: of the model that it was trained on, on the Hub.
    """

    alpha: float
    alphas: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    dora: bool
    parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    base_name: str | None
    revision: str | None

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B·A for a module (rsLoRA: arXiv 2312.03732)."""
        alpha = matched(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def parameters_of(self, module: str) -> list[str]:
        """The names of the parameters of a module that are targets themselves, stacked experts for instance."""
        pairs = [target.rpartition(".") for target in self.parameters]
        return [name for owner, _, name in pairs if module == owner or module.endswith(f".{owner}") or not owner]

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The indices of the trained tokens of an embedding."""
        named = [i for key, i in self.tokens.items() if key and (module == key or module.endswith(f".{key}"))]
        return named[0] if named else self.tokens.get("", ())


def read_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of an adapter.

    Raises:
        MalformedFileError: it is none.
        UnsupportedFormatError: it is of a kind, or uses options, that cannot be computed here; all are named.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MalformedFileError(f"{path}: no configuration of an adapter: {error}", "get the adapter again") from error
    remedy = "merge it into its model with peft (merge_and_unload), then take a diff"
    if kind != "LORA":
        raise UnsupportedFormatError(f"{folder}: a PEFT adapter of the kind {kind}; LORA is read", remedy)
    refused = [f"{key} = {found[key]!r}" for key in sorted(found.keys() - _NEUTRAL - _READ) if found[key]]
    started = str(found.get("init_lora_weights") or "").lower()
    if started.startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights = {started!r} (it was trained on changed base weights)")
    if refused:
        raise UnsupportedFormatError(f"{folder}: this adapter uses what cannot be computed here", remedy, refused)
    try:
        Patterns(found.get("alpha_pattern") or (), f"{path}: alpha_pattern")
        return _parsed(found)
    except (TypeError, ValueError, AttributeError) as error:
        raise MalformedFileError(f"{path}: {error}", "get the adapter again") from error


def _parsed(found: Mapping[str, Any]) -> AdapterConfig:
    tokens = found.get("trainable_token_indices") or {}
    by_name = tokens if isinstance(tokens, Mapping) else {"": tokens}
    name = found.get("base_model_name_or_path")
    on_hub = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return AdapterConfig(
        alpha=float(found.get("lora_alpha", 8)),
        alphas={key: float(alpha) for key, alpha in (found.get("alpha_pattern") or {}).items()},
        rslora=bool(found.get("use_rslora")),
        fan_in_fan_out=bool(found.get("fan_in_fan_out")),
        dora=bool(found.get("use_dora")),
        parameters=tuple(found.get("target_parameters") or ()),
        tokens={key: tuple(int(i) for i in indices) for key, indices in by_name.items()},
        base_name=name if on_hub else None,
        revision=found.get("revision") if on_hub else None,
    )
