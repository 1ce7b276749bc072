"""LoRA in one file under PEFT's names, without its folder: the file says the rank, and perhaps alpha.

Alpha is looked for in `MODULE.alpha` keys and in the header (`lora_adapter_metadata`, `lora_alpha`); a file that does
not tell it cannot be scaled, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weightlab.adapters.config import CONFIG
from weightlab.adapters.forms import AdapterFile, Model, scaled_config
from weightlab.adapters.forms._lora import BIAS, DOWN, EMBEDDING_DOWN, EMBEDDING_UP, UP, computed
from weightlab.adapters.keys import INNER, PREFIX, plain_keys
from weightlab.adapters.lora import FACTOR
from weightlab.adapters.patterns import matched
from weightlab.adapters.reading import Adapter
from weightlab.errors import MalformedFileError, UnsupportedFormatError, UsageError
from weightlab.files.foreign import parse_json

_OURS = re.compile(r".+\.lora_([AB]|embedding_[AB])(\..+)?")
_KINDS = re.compile(r"\.(lora|hada|lokr|ia3|oft|boft|vera|hra|miss|vblora|shira|randlora|spectrum)_")
_ALPHA = ".alpha"
_REMEDY = f"put its {CONFIG} beside it, under the name adapter_model.safetensors"


class _PeftFile:
    def claims(self, found: AdapterFile) -> bool:
        if any(f"{INNER}." in name for name in found.names):  # a model that has adapters inside
            return False
        return any(_OURS.fullmatch(name) or (name.startswith(PREFIX) and _KINDS.search(name)) for name in found.names)

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UsageError: alpha is not known; lists the modules.
        UnsupportedFormatError: lists keys of another kind than LoRA.
        """
        tensors = found.tensors()
        plain = plain_keys(found.label, tensors, "lora_")
        modules: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Tensor] = {}
        alphas: dict[str, float] = {}
        unknown: list[str] = []
        for key, name in plain.items():
            tensor = tensors[key]
            called = re.sub(r"\.(lora_[AB])$", r".\1.weight", name)  # loralib's have no module of their own
            match = FACTOR.fullmatch(called)
            if match:
                modules.setdefault(match["module"], {})[match["part"]] = tensor
            elif name.endswith(_ALPHA) and tensor.numel() == 1:
                alphas[name.removesuffix(_ALPHA)] = float(tensor.reshape(-1)[0])
            elif _KINDS.search(name):
                unknown.append(key)
            else:
                values[name] = tensor
        if unknown or not modules:
            raise UnsupportedFormatError(
                f"{found.label}: tensors of a PEFT adapter that is more than LoRA, without the folder that says what "
                "they are",
                _REMEDY,
                unknown or sorted(plain)[:8],
            )
        merged = [m for m, parts in modules.items() if _in_groups(parts)]
        if merged:
            raise UnsupportedFormatError(
                f"{found.label}: merged layers of loralib (several projections in one), whose parts are not told",
                "let loralib merge it (model.eval()), save the state dict, and take a diff",
                merged,
            )
        scales = self._scales(found, modules, alphas)
        for module, parts in modules.items():
            for part in (UP, BIAS, EMBEDDING_UP):
                if part in parts:
                    parts[part] = parts[part] * scales[module]
        return computed(found, model, scaled_config(found.metadata.get("base_model_name_or_path")), modules, values)

    def _scales(
        self, found: AdapterFile, modules: Mapping[str, Mapping[str, Tensor]], alphas: Mapping[str, float]
    ) -> dict[str, float]:
        told = parse_json(found.metadata.get("lora_adapter_metadata") or "{}", found.label, dict[str, Any])
        general = _number(told.get("lora_alpha", found.metadata.get("lora_alpha", found.metadata.get("alpha"))))
        patterns = told.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or any(_number(alpha) is None for alpha in patterns.values()):
            raise MalformedFileError(f"{found.label}: alpha_pattern is not names with numbers", "get the file again")
        exact = {re.escape(str(key)): _number(alpha) for key, alpha in patterns.items()}
        scales: dict[str, float] = {}
        missing: list[str] = []
        for module, parts in modules.items():
            alpha = alphas.get(module, matched(exact, module, general))
            down = next((parts[name] for name in (DOWN, EMBEDDING_DOWN) if name in parts), None)
            rank = down.shape[0] if down is not None and down.ndim else 0
            if alpha is None:
                missing.append(f"{module}, rank {rank}")
            scales[module] = (
                0.0 if alpha is None or not rank else alpha / (rank**0.5 if told.get("use_rslora") else rank)
            )
        if missing:
            raise UsageError(
                f"{found.label}: a LoRA file under PEFT's names, and nothing in it tells alpha",
                f"{_REMEDY}: lora_alpha is in it",
                missing,
            )
        return scales


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < 1e30 else None


def _in_groups(parts: Mapping[str, Tensor]) -> bool:
    """Whether A has several times the rank of B: loralib's layers of several projections."""
    if DOWN not in parts or UP not in parts or parts[DOWN].ndim != 2 or parts[UP].ndim != 2:
        return False
    rows, rank = parts[DOWN].shape[0], parts[UP].shape[1]
    return 0 < rank < rows and rows % rank == 0


FORM = _PeftFile()
"""Plug-in for `weightlab.adapters.forms`."""
