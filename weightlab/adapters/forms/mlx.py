"""Adapters of mlx-lm: `adapters.safetensors` and an `adapter_config.json` that says `fine_tune_type`.

`lora_a` is [in, r] and `lora_b` [r, out]; the weight gains scale · (lora_a · lora_b)ᵀ, with `scale` as it is (not
divided by the rank). DoRA then gives each row the length `m`. Source: ml-explore/mlx-lm `tuner/lora.py`, `dora.py`.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from weightlab.adapters.forms import AdapterFile, Model, scaled_config
from weightlab.adapters.forms._lora import DOWN, EMBEDDING_DOWN, EMBEDDING_UP, MAGNITUDE, UP, computed, embeds
from weightlab.adapters.reading import Adapter
from weightlab.errors import UnsupportedFormatError, UsageError
from weightlab.files.foreign import validated

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")

_OF_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    scale: float | None = None
    alpha: float | None = None


class _Config(BaseModel):
    """What of it counts."""

    model_config = ConfigDict(extra="allow", strict=True)
    fine_tune_type: str | None = None
    lora_parameters: _Parameters | None = None
    model: Any = None


class _Mlx:
    def claims(self, found: AdapterFile) -> bool:
        if found.file is None or not found.file.name.endswith(".safetensors"):
            return False
        factors = any(name.endswith((".lora_a", ".lora_b")) for name in found.names)
        return factors or (bool(found.names) and "fine_tune_type" in found.config)

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UsageError: there is no adapter_config.json that tells the scale.
        UnsupportedFormatError: a fine_tune_type that is not known.
        MalformedFileError: lists factors that are missing or cannot be multiplied.
        """
        config: _Config = validated(dict(found.config), _Config, f"{found.label}: adapter_config.json")
        kind = config.fine_tune_type or "lora"
        if kind not in ("lora", "dora", "full"):
            raise UnsupportedFormatError(
                f"{found.label}: an adapter of mlx-lm of the kind {kind[:80]!r}; lora, dora and full are read",
                "fuse it with mlx_lm.fuse, then take a diff",
            )
        scale = None if config.lora_parameters is None else config.lora_parameters.scale
        tensors = found.tensors()
        factors = [key for key in tensors if _KEY.fullmatch(key)]
        if scale is None and factors and kind != "full":
            raise UsageError(
                f"{found.label}: an adapter of mlx-lm, whose scale is not known",
                "put its adapter_config.json beside it, with lora_parameters: {scale: ...}",
            )
        modules: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            match = None if kind == "full" else _KEY.fullmatch(key)
            if match is None:
                values[key] = tensor
                continue
            for module, own in _experts(match["module"], tensor, model):
                modules.setdefault(module, {})[match["part"]] = own
        parts = {module: _parts(module, found, scale or 0.0, model) for module, found in modules.items()}
        adapter = computed(found, model, scaled_config(config.model), parts, values)
        if factors and config.lora_parameters is not None and config.lora_parameters.alpha is not None:
            adapter.notes.append(
                f"{found.label} says alpha beside scale: mlx-lm takes scale alone; "
                "early versions took scale * alpha / rank"
            )
        return adapter


def _experts(module: str, tensor: Tensor, model: Model) -> list[tuple[str, Tensor]]:
    """The modules that a factor is for, each with its own: experts are stacked, [experts, r, in] and [experts, out, r].

    Those are turned to what layers have, [in, r] and [r, out]. Without a model that has the experts one by one the
    module stays as it is, and is told as what does not fit.
    """
    if tensor.ndim != 3 or ".switch_mlp." not in module:
        return [(module, tensor)]
    head, _, last = module.partition(".switch_mlp.")
    for names in ({}, _OF_MIXTRAL):
        experts = [f"{head}.experts.{number}.{names.get(last, last)}" for number in range(tensor.shape[0])]
        if experts and all(model.shapes(f"{expert}.weight") is not None for expert in experts):
            return [(expert, tensor[number].T) for number, expert in enumerate(experts)]
    return [(module, tensor)]


def _parts(module: str, found: dict[str, Tensor], scale: float, model: Model) -> dict[str, Tensor]:
    """A module's factors as PEFT has them; those that are missing or no matrices are told there."""
    first, second = found.get("lora_a"), found.get("lora_b")
    magnitude = {MAGNITUDE: found["m"]} if "m" in found else {}
    down = {} if first is None else {DOWN: first.T.contiguous() if first.ndim == 2 else first}
    up = {} if second is None else {UP: second.T.contiguous() * scale if second.ndim == 2 else second}
    matrices = first is not None and second is not None and first.ndim == second.ndim == 2
    if matrices and embeds(module, model, (down[DOWN].shape[1], up[UP].shape[0])):
        return {EMBEDDING_DOWN: down[DOWN], EMBEDDING_UP: up[UP], **magnitude}
    return {**down, **up, **magnitude}


FORM = _Mlx()
"""Plug-in for `weightlab.adapters.forms`."""
