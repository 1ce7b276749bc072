"""LoRA adapters of llama.cpp: a GGUF file of the type `adapter`, with llama.cpp's names and its order of rows.

The scale is `adapter.lora.alpha` / rank, and 1 where alpha is 0. Names and orders go back to transformers' through its
own map and tensor processors, for the architectures that it reads. Source: ggml-org/llama.cpp `llama-adapter.cpp`,
`convert_lora_to_gguf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.forms import GGUF, AdapterFile, Model, scaled_config
from weightlab.adapters.forms._lora import DOWN, EMBEDDING_DOWN, EMBEDDING_UP, UP, computed
from weightlab.adapters.reading import Adapter
from weightlab.errors import MalformedFileError, UnsupportedFormatError, UsageError

# The header's entry `general.type` = "adapter": key, type 8 (text), length, text.
_MARK = re.compile(rb"general\.type\x08\x00\x00\x00\x07\x00{7}adapter")
_BEGIN = 2**20
_KEY = re.compile(r"(?P<tensor>.+)\.lora_(?P<side>[ab])")
_EMBEDDING = "token_embd.weight"
_BY_ROWS = ("LlamaTensorProcessor",)  # they only reorder rows
_NOT_MATRICES = (
    *("TensorProcessor", "GPT2TensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor"),
    *("T5TensorProcessor", "Qwen2MoeTensorProcessor", "GptOssTensorProcessor", "Lfm2TensorProcessor"),
)
"""They leave matrices of layers as they are, or lay them as `Conv1D` has them, which the shapes tell."""
_REMEDY = "put the adapter's PEFT folder, which it was converted from, on the model"


class _Gguf:
    def claims(self, found: AdapterFile) -> bool:
        if found.file is None or not found.file.name.endswith(GGUF):
            return False
        try:
            with open(found.file, "rb") as file:
                return _MARK.search(file.read(_BEGIN)) is not None
        except OSError:
            return False

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UsageError: gguf or transformers is not installed; the network is not known.
        MalformedFileError: it is no whole GGUF file, or has factors that make no sense.
        UnsupportedFormatError: lists tensors, or names an architecture, that transformers does not map.
        """
        fields, tensors = _contents(found)
        kind, architecture = fields.get("adapter.type"), fields.get("general.architecture")
        if kind != "lora":
            raise UnsupportedFormatError(f"{found.label}: a GGUF adapter of the type {str(kind)[:80]!r}", _REMEDY)
        network = model.network()
        if network is None:
            raise UsageError(
                f"{found.label}: a GGUF adapter has llama.cpp's names, which the network is needed to translate",
                "name the folder of the model, with its config.json (and install transformers)",
            )
        names, reorder = _translation(found.label, str(architecture), network)
        alpha = fields.get("adapter.lora.alpha")
        if not isinstance(alpha, int | float):
            raise MalformedFileError(f"{found.label}: adapter.lora.alpha is not in it", "get the file again")
        modules: dict[str, dict[str, Tensor]] = {}
        unknown: list[str] = []
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            name = None if match is None else names.get(match["tensor"])
            if match is None or name is None or not name.endswith(".weight") or tensor.ndim != 2:
                unknown.append(f"{key} {list(tensor.shape)}")
                continue
            parts = modules.setdefault(name.removesuffix(".weight"), {})
            embeds = match["tensor"] == _EMBEDDING
            if match["side"] == "a":
                parts[EMBEDDING_DOWN if embeds else DOWN] = tensor.T.contiguous() if embeds else tensor
            else:
                scale = alpha / tensor.shape[1] if alpha and tensor.shape[1] else 1.0
                parts[EMBEDDING_UP if embeds else UP] = reorder(tensor, match["tensor"]) * scale
        if unknown:
            raise UnsupportedFormatError(
                f"{found.label}: tensors of a GGUF adapter that have no counterpart in the network", _REMEDY, unknown
            )
        return computed(found, model, scaled_config(fields.get("general.base_model.0.name")), modules, {})


def _contents(found: AdapterFile) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The header's entries that count, and all tensors in fp32."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"{found.label}: reading GGUF needs gguf", "pip install 'weightlab[gguf]'") from error
    wanted = ("adapter.type", "adapter.lora.alpha", "general.architecture", "general.base_model.0.name")
    try:
        reader = gguf.GGUFReader(str(found.file))
        fields = {name: reader.fields[name].contents() for name in wanted if name in reader.fields}
        tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OSError, TypeError, OverflowError, NotImplementedError) as error:
        raise MalformedFileError(f"{found.label}: no whole GGUF file: {error}", "get the file again") from error
    return fields, tensors


def _translation(label: str, architecture: str, network: Any) -> tuple[Mapping[str, str], Any]:
    """({llama.cpp's name: the network's}, what puts rows of B in the network's order)."""
    try:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError as error:
        raise UsageError(f"{label}: a GGUF adapter needs transformers", "pip install transformers") from error
    processor_kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    name = processor_kind.__name__
    if architecture not in GGUF_CONFIG_MAPPING or name not in (*_BY_ROWS, *_NOT_MATRICES):
        raise UnsupportedFormatError(
            f"{label}: a GGUF adapter for the architecture {architecture[:80]!r}, whose order of weights transformers "
            "does not tell",
            _REMEDY,
        )
    config = network.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    make: Any = processor_kind
    processor = make(
        config={"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", heads)}
    )
    try:
        names = get_gguf_hf_weights_map(network, processor, architecture, config.num_hidden_layers)
    except (NotImplementedError, AttributeError, ImportError) as error:
        raise UnsupportedFormatError(f"{label}: {error}", _REMEDY) from error

    def reorder(tensor: Tensor, called: str) -> Tensor:
        if name not in _BY_ROWS:
            return tensor
        try:
            done = processor.process(tensor.numpy(), called)
        except ValueError as error:
            raise MalformedFileError(
                f"{label}: {called} has {tensor.shape[0]} rows, and the model {heads} heads", "give its own model"
            ) from error
        return torch.from_numpy(done.weights.copy())

    return names, reorder


FORM = _Gguf()
"""Plug-in for `weightlab.adapters.forms`."""
