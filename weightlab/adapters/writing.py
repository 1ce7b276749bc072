"""A PEFT adapter from factors and values: its tensors and its configuration.

Each module has a rank of its own and alpha = rank, so that B·A is added as it is. Names are the network's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlab.networks.layout import Kind

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Factors:
    """left [m, r] · right [r, n] on a module's weight, a matrix with one row for each of its first dimension.

    Attributes:
        kind: what the module is.
        kernel: height and width of a convolution.
    """

    kind: Kind
    left: Tensor
    right: Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    def padded(self, rank: int) -> Factors:
        """The same product with zeros up to a rank."""
        more = rank - self.rank
        left, right = self.left, self.right
        left = torch.cat([left, left.new_zeros(left.shape[0], more)], 1)
        return Factors(self.kind, left, torch.cat([right, right.new_zeros(more, right.shape[1])]), self.kernel)


def adapter_tensors(modules: Mapping[str, Factors], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What goes into adapter_model.safetensors.

    Args:
        values: {the network's name of a tensor: what it becomes}.
    """
    found: dict[str, Tensor] = {}
    for module, factors in modules.items():
        place, left, right = f"{_PREFIX}{module}", factors.left, factors.right
        if factors.kind == "embedding":
            found |= {f"{place}.lora_embedding_A": left.T, f"{place}.lora_embedding_B": right.T}
            continue
        if factors.kind == "conv1d":
            left, right = right.T, left.T
        if factors.kind == "convolution":
            inputs = right.shape[1] // torch.Size(factors.kernel).numel()
            right = right.reshape(-1, inputs, *factors.kernel)
            left = left.reshape(*left.shape, *(1 for _ in factors.kernel))
        found |= {f"{place}.lora_A.weight": right, f"{place}.lora_B.weight": left}
    for name, tensor in values.items():
        module, _, own = name.rpartition(".")
        found[f"{_PREFIX}{module}.base_layer.{own}" if module in modules else f"{_PREFIX}{name}"] = tensor
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def adapter_config(
    modules: Mapping[str, Factors], values: Mapping[str, Tensor], *, short: bool, base_name: str | None
) -> dict[str, Any]:
    """What goes into adapter_config.json.

    Args:
        short: one rank for all, and modules by the last part of their names, as vLLM wants it.
    """
    ranks = {module: factors.rank for module, factors in modules.items()}
    rank = max(ranks.values(), default=1)
    own = {module: r for module, r in ranks.items() if r != rank}
    biases = [name for name in values if name.rpartition(".")[2] == "bias" and name.rpartition(".")[0] in modules]
    saved = sorted({name.rpartition(".")[0] for name in values if name not in biases})
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules} if short else modules),
        "modules_to_save": saved or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": any(factors.kind == "conv1d" for factors in modules.values()),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }
