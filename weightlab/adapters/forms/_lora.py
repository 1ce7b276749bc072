"""LoRA of language models in other forms, computed by the same rules as PEFT's: which way a weight lies and so on."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from weightlab.adapters.changes import Values
from weightlab.adapters.config import AdapterConfig
from weightlab.adapters.forms import AdapterFile, Model
from weightlab.adapters.lora import LoraModules
from weightlab.adapters.reading import Adapter
from weightlab.errors import MalformedFileError

DOWN, UP, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_DOWN, EMBEDDING_UP = "lora_embedding_A", "lora_embedding_B"


def computed(
    found: AdapterFile,
    model: Model,
    config: AdapterConfig,
    modules: dict[str, dict[str, Tensor]],
    values: dict[str, Tensor],
) -> Adapter:
    """The adapter of these factors, scaled already, and of these new values.

    Args:
        modules: {the network's module: {part as PEFT calls it: tensor}}.
        values: {the network's tensor: its values}.

    Raises:
        MalformedFileError: lists factors that are missing or cannot be multiplied; or there is nothing at all.
        UsageError: which way square matrices lie cannot be told.
    """
    if not modules and not values:
        raise MalformedFileError(f"{found.label}: an adapter without tensors", "get the file again")
    loras = LoraModules(found.label, config, cache(model.network), model.shapes, None, modules)
    adapter = Adapter(found.label, config)
    for name, tensor in values.items():
        adapter.changes.setdefault(name, []).append(Values(tensor))
    for name, changes in loras.changes().items():
        adapter.changes.setdefault(name, []).extend(changes)
    return adapter


def embeds(module: str, model: Model, sizes: tuple[int, int]) -> bool:
    """Whether a module is an embedding, by its name, with a weight of these [rows, columns]."""
    shape = model.shapes(f"{module}.weight")
    last = module.rpartition(".")[2]
    return any(word in last for word in ("embed", "wte", "wpe")) and shape in (None, sizes)
