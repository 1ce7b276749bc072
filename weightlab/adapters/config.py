"""`adapter_config.json`: which parts of it decide what an adapter does, and which cannot be computed here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from weightlab.adapters.kinds import refuse_kind
from weightlab.adapters.patterns import Patterns, matched
from weightlab.errors import InputError, MalformedFileError, UnsupportedFormatError
from weightlab.files.foreign import read_bytes, read_json, validated

CONFIG = "adapter_config.json"

ExpertsLayout: TypeAlias = Literal["peft", "unsloth"]
"""How `lora_B` of stacked experts is packed: rank by rank with all experts side by side, or expert by expert."""
LAYOUTS: Mapping[str, ExpertsLayout] = {"rank_major": "peft", "grouped_by_expert": "unsloth"}

# What does not change what a trained adapter does: how it was trained, or what the keys of its file say anyway.
_NEUTRAL = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights", "modules_to_save"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("loftq_config", "target_modules", "task_type", "unsloth_fixed", "unsloth_fused_expert_lora"),
    )
)
_READ = frozenset(
    (
        *("alpha_pattern", "fan_in_fan_out", "lora_alpha", "lora_B_layout", "target_parameters"),
        *("trainable_token_indices", "use_dora", "use_rslora"),
    )
)
VARIANTS = ("kasa_config", "monteclora_config", "use_bdlora", "velora_config")
"""Options of LoRA that change what its factors mean, and that peft folds."""
_NOT_FOLDED = {
    "alora_invocation_tokens": "it acts on some tokens of the input only",
    "arrow_config": "it weighs several adapters anew for each token",
    "enable_lora": "a merged linear layer of 2023",
    "layer_replication": "the network that it was trained on has layers more than once",
    "megatron_config": "it is for Megatron's parallel layers",
    "use_qalora": "it works on pooled inputs, beside a quantised weight",
}
# These start from a base whose weights they change, so that the file alone does not say what the adapter is.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
_REMEDY = "merge it into its model with peft (merge_and_unload), then take a diff"

_Number: TypeAlias = Annotated[float, Field(gt=-1e30, lt=1e30)]
_Index: TypeAlias = Annotated[int, Field(ge=0, lt=2**40)]


class _Settings(BaseModel):
    """The types of what is read of it; whatever else is there is looked at by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str | None = None
    r: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    lora_alpha: _Number | None = None
    alpha_pattern: dict[str, _Number] | None = None
    rank_pattern: dict[str, Any] | None = None
    fan_in_fan_out: bool | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    target_parameters: list[str] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[_Index] | dict[str, list[_Index]] | None = None
    token_indices: list[_Index] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    init_lora_weights: Any = None
    lora_B_layout: Literal["rank_major", "grouped_by_expert"] | None = None
    unsloth_fused_expert_lora: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What is needed to compute an adapter's change.

    Attributes:
        tokens: indices of trained tokens; {end of the embedding's name: indices}, "" for the input embedding.
        base_name, revision: of the model that it was trained on, on the Hub.
        kind: its `PeftType`.
        through_peft: whether peft's layers compute it.
        trained_on: what the configuration calls the model that it was trained on.
        says_orientation: whether `fan_in_fan_out` is in it at all.
        experts_layout: how stacked experts are packed, where it says so; `experts_layouts` by parameter.
        by_unsloth: whether it looks like one that Unsloth made.
        settings: all of it.
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
    kind: str = "LORA"
    through_peft: bool = False
    trained_on: str | None = None
    says_orientation: bool = True
    experts_layout: ExpertsLayout | None = None
    experts_layouts: Mapping[str, ExpertsLayout] = field(default_factory=dict)
    by_unsloth: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B·A for a module (rsLoRA: arXiv 2312.03732)."""
        alpha: float = matched(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def rank_of(self, module: str) -> int | None:
        """The rank that a module has by the configuration; None where it says none."""
        rank = self.settings.get("r")
        found = matched(self.settings.get("rank_pattern") or {}, module, rank)
        return found if isinstance(found, int) and found > 0 else None

    def parameters_of(self, module: str) -> list[str]:
        """The names of the parameters of a module that are targets themselves, stacked experts for instance."""
        pairs = [target.rpartition(".") for target in self.parameters]
        return [name for owner, _, name in pairs if module == owner or module.endswith(f".{owner}") or not owner]

    def is_apart(self, module: str) -> bool:
        """Whether `modules_to_save` made a copy of a module, which has no ties to what the module was tied to."""
        saved = self.settings.get("modules_to_save")
        if not isinstance(saved, list) or self.settings.get("ensure_weight_tying"):
            return False
        return any(module == name or module.endswith(f".{name}") for name in saved)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The indices of the trained tokens of an embedding."""
        named = [i for key, i in self.tokens.items() if key and (module == key or module.endswith(f".{key}"))]
        return named[0] if named else self.tokens.get("", ())


def read_config(folder: Path) -> AdapterConfig:
    """Reads the configuration of an adapter.

    Raises:
        MalformedFileError: it is none; every place that is wrong is listed.
        UnsupportedFormatError: it is of a kind, or uses options, that cannot be computed here; all are named.
    """
    path = folder / CONFIG
    tree = read_json(path, dict[str, Any])
    kind = tree.get("peft_type", "LORA" if "r" in tree and "lora_alpha" in tree else None)
    if not isinstance(kind, str):
        raise MalformedFileError(f"{path}: no configuration of an adapter: it has no peft_type", "get the file again")
    refuse_kind(str(folder), kind)
    through_peft = kind not in ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
    if kind in ("LORA", "ADALORA"):
        _refuse_options(folder, tree, kind)
    settings: _Settings = validated(tree if not through_peft else _common(tree), _Settings, str(path))
    if kind == "LORA":
        through_peft = any(tree.get(name) for name in VARIANTS) or settings.init_lora_weights == "mica"
    _check_patterns(path, tree)
    return _parsed(kind, settings, tree, through_peft, _unsloth_made(folder, tree))


def _common(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What all kinds have; the rest is peft's to judge."""
    common = ("base_model_name_or_path", "modules_to_save", "peft_type", "revision", "target_modules")
    return {name: tree[name] for name in common if name in tree}


def _refuse_options(folder: Path, tree: Mapping[str, Any], kind: str) -> None:
    refused = [f"{name}: {why}" for name, why in _NOT_FOLDED.items() if tree.get(name)]
    if kind == "LORA":
        unknown = sorted(tree.keys() - _NEUTRAL - _READ - set(VARIANTS) - set(_NOT_FOLDED))
        refused += [f"{name} = {str(tree[name])[:80]}: not known here" for name in unknown if tree[name]]
    started = str(tree.get("init_lora_weights") or "").lower()
    if started.startswith(_CHANGES_BASE):
        refused.append(f"init_lora_weights = {started[:40]!r}: it was trained on changed base weights")
        remedy = "save it with path_initial_model_for_weight_conversion, as peft tells; or " + _REMEDY
        raise UnsupportedFormatError(f"{folder}: this adapter is not for the model as it is", remedy, refused)
    if refused:
        raise UnsupportedFormatError(f"{folder}: this adapter uses what cannot be computed here", _REMEDY, refused)


def _check_patterns(path: Path, tree: Mapping[str, Any]) -> None:
    wrong: list[str] = []
    for name, patterns in tree.items():
        if name.endswith("_pattern") and isinstance(patterns, dict):
            try:
                Patterns(patterns, str(path))
            except MalformedFileError as error:
                wrong += [f"{name}: {offender}" for offender in error.offenders]
    if wrong:
        raise MalformedFileError(f"{path}: these are no regular expressions", "mend the file", wrong)


def _unsloth_made(folder: Path, tree: Mapping[str, Any]) -> bool:
    """Whether the configuration or the model card says that Unsloth made the adapter."""
    if tree.get("unsloth_fixed") or "unsloth" in str(tree.get("auto_mapping")).lower():
        return True
    if str(tree.get("base_model_name_or_path")).lower().startswith("unsloth/"):
        return True
    try:
        return b"unsloth" in read_bytes(folder / "README.md", limit=2**20).lower()
    except InputError:  # no card
        return False


def _parsed(
    kind: str, found: _Settings, tree: Mapping[str, Any], through_peft: bool, by_unsloth: bool
) -> AdapterConfig:
    tokens = found.trainable_token_indices or {}
    if kind == "TRAINABLE_TOKENS":
        tokens = found.token_indices or []
    by_name = tokens if isinstance(tokens, dict) else {"": tokens}
    name = found.base_model_name_or_path
    on_hub = (
        name is not None and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None and not Path(name).exists()
    )
    packed = (found.unsloth_fused_expert_lora or {}).get("parameters")
    layouts = {
        str(parameter): LAYOUTS[told["lora_B_layout"]]
        for parameter, told in (packed.items() if isinstance(packed, dict) else ())
        if isinstance(told, dict) and isinstance(told.get("lora_B_layout"), str) and told["lora_B_layout"] in LAYOUTS
    }
    return AdapterConfig(
        alpha=8.0 if found.lora_alpha is None else float(found.lora_alpha),
        alphas={key: float(alpha) for key, alpha in (found.alpha_pattern or {}).items()},
        rslora=bool(found.use_rslora),
        fan_in_fan_out=bool(found.fan_in_fan_out),
        dora=bool(found.use_dora),
        parameters=tuple(found.target_parameters or ()),
        tokens={key: tuple(indices) for key, indices in by_name.items()},
        base_name=name if on_hub else None,
        revision=found.revision if on_hub else None,
        kind=kind,
        through_peft=through_peft,
        trained_on=name,
        says_orientation=found.fan_in_fan_out is not None,
        experts_layout=None if found.lora_B_layout is None else LAYOUTS[found.lora_B_layout],
        experts_layouts=layouts,
        by_unsloth=by_unsloth,
        settings=dict(tree),
    )
