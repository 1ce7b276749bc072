"""Adapters of torchtune: `adapter_N.pt` (or `adapter_model.pt`), with torchtune's names of the modules.

The scale is alpha / rank, with alpha from the `adapter_config.json` beside it. Where torchtune keeps the rows of the
query and key projections as Meta's code does, rotary pairs side by side, they are put in the order of transformers.
Source: pytorch/torchtune `models/convert_weights.py` and the converters of its models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from weightlab.adapters.forms import AdapterFile, Model, scaled_config
from weightlab.adapters.forms._lora import DOWN, MAGNITUDE, UP, computed
from weightlab.adapters.reading import Adapter
from weightlab.errors import UnsupportedFormatError, UsageError
from weightlab.files.foreign import read_json, validated

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<module>.+)")
_IN_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_OUTSIDE = {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}
_PARTS = {"lora_a.weight": DOWN, "lora_b.weight": UP, "magnitude": MAGNITUDE}
_PERMUTED = ("llama", "mistral", "gemma", "gemma2")
"""Kinds of models of transformers whose query and key rows torchtune keeps in another order."""
_AS_THEY_ARE = ("qwen2", "qwen3")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    lora_alpha: float | None = None
    r: int | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None


class _Torchtune:
    def claims(self, found: AdapterFile) -> bool:
        return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in found.names)

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UsageError: alpha is not known; or query or key rows have to be reordered, and the heads are not known.
        UnsupportedFormatError: lists modules that transformers has no name for; a model of another kind.
        """
        settings: _Settings = validated(dict(found.config), _Settings, f"{found.label}: adapter_config.json")
        if settings.lora_alpha is None:
            raise UsageError(
                f"{found.label}: an adapter of torchtune, whose alpha is not known",
                "put its adapter_config.json beside it, with lora_alpha",
            )
        heads = _Heads(found.label, model)
        modules: dict[str, dict[str, Tensor]] = {}
        unknown: list[str] = []
        for key, tensor in found.tensors().items():
            match = _KEY.fullmatch(key)
            name = None if match is None else _module(match["module"])
            if match is None or name is None:
                unknown.append(key)
                continue
            part = _PARTS[match["part"]]
            permuted = part in (UP, MAGNITUDE) and name.endswith(("q_proj", "k_proj"))
            modules.setdefault(name, {})[part] = heads.reordered(tensor, name) if permuted else tensor
        if unknown:
            raise UnsupportedFormatError(
                f"{found.label}: modules of torchtune that have no counterpart in transformers",
                "save the adapter in PEFT's form with torchtune's own checkpointer",
                unknown,
            )
        for parts in modules.values():
            if DOWN in parts and UP in parts and parts[DOWN].ndim and parts[DOWN].shape[0]:
                rank = parts[DOWN].shape[0]
                parts[UP] = parts[UP] * (settings.lora_alpha / (rank**0.5 if settings.use_rslora else rank))
        return computed(found, model, scaled_config(settings.base_model_name_or_path), modules, {})


def _module(name: str) -> str | None:
    """What transformers calls a module of torchtune's; None where it has none."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTSIDE.get(name)
    inner = _IN_LAYER.get(match["module"])
    return None if inner is None else f"model.layers.{match['number']}.{inner}"


class _Heads:
    """How many heads the model has, asked for when first needed."""

    def __init__(self, label: str, model: Model) -> None:
        self._label, self._model = label, model
        self._config: Mapping[str, Any] | None = None

    def reordered(self, tensor: Tensor, module: str) -> Tensor:
        """Rows of a query or key projection, [heads · size, ...], in the order of transformers."""
        config = self._of_model()
        kind = config.get("model_type")
        if kind in _AS_THEY_ARE:
            return tensor
        heads = config.get("num_attention_heads")
        if module.endswith("k_proj"):
            heads = config.get("num_key_value_heads") or heads
        if kind not in _PERMUTED:
            raise UnsupportedFormatError(
                f"{self._label}: an adapter of torchtune for a model of the kind {str(kind)[:80]!r}, whose order of "
                "rows is not known here",
                "save the adapter in PEFT's form with torchtune's own checkpointer",
            )
        if type(heads) is not int or heads < 1 or not tensor.ndim or tensor.shape[0] % (2 * heads):
            raise UsageError(
                f"{self._label}: {module} has {list(tensor.shape)}, and the model's config.json says {heads} heads",
                "give the model that it was trained on",
            )
        paired = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return paired.transpose(1, 2).reshape(tensor.shape)

    def _of_model(self) -> Mapping[str, Any]:
        if self._config is None:
            path = None if self._model.base is None else self._model.base.path
            folder = path if path is None or path.is_dir() else path.parent
            if folder is None or not (Path(folder) / "config.json").is_file():
                raise UsageError(
                    f"{self._label}: an adapter of torchtune keeps rows of queries and keys in another order, and the "
                    "number of heads is not known",
                    "name the folder of the model, with its config.json",
                )
            config: dict[str, Any] = read_json(Path(folder) / "config.json", dict[str, Any])
            inner = config.get("text_config")
            self._config = inner if isinstance(inner, dict) else config
        return self._config


FORM = _Torchtune()
"""Plug-in for `weightlab.adapters.forms`."""
