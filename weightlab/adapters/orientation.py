"""Which matrices lie [in, out]: peft decides it module by module, and keeps one flag for all of them.

`torch.nn.Linear` has its weight as [out, in], transformers' `Conv1D` (GPT-2) as [in, out], and an adapter may be on
both. The network tells; without one the shape does; a square matrix lies as `fan_in_fan_out` says where the adapter's
other matrices agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from weightlab.adapters.config import AdapterConfig
from weightlab.errors import UsageError

Shapes: TypeAlias = Callable[[str], tuple[int, ...] | None]
"""The shape that one of the network's tensors has in the model; None where the model has none, or is not known."""

_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")  # what GPT-2 calls its modules of that class


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a module's factors make, and for which tensor: [outputs, inputs] as peft has it."""

    module: str
    weight: str
    outputs: int
    inputs: int


def turned(
    label: str, config: AdapterConfig, matrices: Mapping[str, Matrix], shapes: Shapes, network: Callable[[], Any]
) -> dict[str, bool]:
    """{key: whether the weight is [in, out]}.

    Raises:
        UsageError: lists the square matrices of which nothing tells how they lie, and those that contradict the flag.
    """
    flag = config.fan_in_fan_out
    found: dict[str, bool] = {}
    doubtful: list[str] = []
    agree: list[str] = []
    against: list[str] = []
    for key, matrix in matrices.items():
        shape, square = shapes(matrix.weight), matrix.outputs == matrix.inputs
        if shape is not None and len(shape) == 2 and not square:
            found[key] = shape == (matrix.inputs, matrix.outputs)
            (agree if found[key] == flag else against).append(
                f"{matrix.module} {list(shape)}: lies {'[in, out]' if found[key] else '[out, in]'}"
            )
            continue
        lies = _by_network(network(), matrix.module)
        found[key] = flag if lies is None else lies
        named = matrix.module.rpartition(".")[2] in _CONV1D and not flag
        if lies is None and square and (shape is not None or named):
            doubtful.append(f"{matrix.module} [{matrix.outputs}, {matrix.inputs}]{': as in GPT-2' if named else ''}")
    silent = not agree and not config.says_orientation
    if doubtful and (against or silent or any(line.endswith("GPT-2") for line in doubtful)):
        said = f"is {str(flag).lower()}" if config.says_orientation else "is not in adapter_config.json"
        raise UsageError(
            f"{label}: which way these square matrices lie is not known without the network: fan_in_fan_out {said}"
            + (", and others lie the other way" if against else ""),
            "put it on a folder with the model's config.json (and install transformers)",
            [*doubtful, *against],
        )
    return found


def submodule(network: Any, name: str) -> Any:
    """A module of a network, also where only one of the names begins as with a head; None: there is none."""
    if network is None or not name:
        return None
    parts = name.split(".")
    names = [".".join(parts[start:]) for start in range(len(parts))]
    head = getattr(network, "base_model_prefix", "")
    for candidate in (name, *([f"{head}.{name}"] if isinstance(head, str) and head else []), *names[1:-1]):
        try:
            return network.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def _by_network(network: Any, name: str) -> bool | None:
    """Whether the network's module has its weight as [in, out]; None where that is not known."""
    module = submodule(network, name)
    if type(module).__name__ == "Conv1D":
        return True
    return False if isinstance(module, nn.Linear | nn.MultiheadAttention) else None
