"""GGUF files, dequantised: not the weights that they were made of, but what is left of them.

transformers reads them: it knows the names, and which tensors llama.cpp has permuted. The model is in memory, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weightlab.errors import InputError, MalformedFileError, UsageError
from weightlab.networks.names import file_tensors
from weightlab.sources import Source
from weightlab.sources.virtual.memory import MemorySource


class GgufSource(MemorySource):
    """A dequantised model.

    Attributes:
        cautions: what whoever uses it must know.
    """

    cautions: tuple[str, ...]


class _Gguf:
    def claims(self, path: Path) -> bool:
        return path.is_file() and path.suffix == ".gguf"

    def open(self, path: Path, key: str | None) -> Source:
        """Raises:
        UsageError: gguf or transformers is not installed.
        InputError: transformers does not know the architecture, or tensors are missing; they are listed.
        """
        try:
            import gguf
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        except ImportError as error:
            raise UsageError(f"{path}: reading GGUF needs {error.name}", "pip install 'weightlab[gguf]'") from error
        try:
            kinds = sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors})
        except (ValueError, IndexError, OSError) as error:
            raise MalformedFileError(f"{path}: no whole GGUF file: {error}", "get the file again") from error
        try:
            load: Any = AutoConfig.from_pretrained
            read: Any = load_gguf_checkpoint
            config = load(path.parent, gguf_file=path.name, local_files_only=True)
            make: Any = AutoModelForCausalLM.from_config
            with torch.device("meta"):
                network = make(config)
            tensors = read(str(path), return_tensors=True, model_to_load=network)["tensors"]
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise InputError(f"{path}: transformers cannot read it: {error}", "convert it to safetensors") from error
        network.load_state_dict(tensors, strict=False, assign=True)
        network.tie_weights()
        state = file_tensors(network)
        missing = [name for name, tensor in state.items() if tensor.is_meta]
        if missing:
            raise InputError(f"{path}: {len(missing)} tensors are missing", "get the file again", missing)
        source = GgufSource(state, str(path), path)
        told = f"{path.name} is dequantised ({', '.join(kinds)}): not the weights that it was made of"
        source.cautions = (told,)
        return source


SOURCE = _Gguf()
"""Plug-in for `weightlab.sources`."""
