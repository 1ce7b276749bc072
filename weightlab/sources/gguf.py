"""GGUF files, dequantised: not the weights that they were made of, but what is left of them.

transformers reads them: it knows the names, and which tensors llama.cpp has permuted. The model is in memory, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weightlab.errors import InputError, MalformedFileError, UnknownNetworkError, UsageError
from weightlab.networks.names import file_tensors
from weightlab.networks.plausible import require_plausible, within_bounds
from weightlab.networks.trust import trust_remote_code
from weightlab.sources import Source
from weightlab.sources.virtual.memory import MemorySource
from weightlab.tensors.spec import TensorSpec


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
        MalformedFileError: it is no whole GGUF file.
        UnknownNetworkError: its numbers ask for a network that its tensors do not make plausible.
        InputError: transformers does not know the architecture, or tensors are missing; they are listed.
        """
        try:
            import gguf
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        except ImportError as error:
            raise UsageError(f"{path}: reading GGUF needs {error.name}", "pip install 'weightlab[gguf]'") from error
        try:
            reader = gguf.GGUFReader(path)
            kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
            specs = {t.name: TensorSpec(t.name, "F32", tuple(map(int, t.shape))) for t in reader.tensors}
            numbers = {n: field.contents() for n, field in reader.fields.items() if len(field.types) == 1}
        except Exception as error:  # the reader takes the file as it is
            raise MalformedFileError(f"{path}: no whole GGUF file: {error}", "get the file again") from error
        require_plausible(numbers, specs, str(path))
        # transformers makes a table of all names in every block, again for each of the network's modules.
        blocks = [n for n in numbers if n.endswith(".block_count") and not 0 <= numbers[n] <= len(specs)]
        if blocks:
            raise UnknownNetworkError(
                f"{path}: more blocks than tensors", "get the file again", [f"{n} = {numbers[n]}" for n in blocks]
            )
        try:
            load: Any = AutoConfig.from_pretrained
            read: Any = load_gguf_checkpoint
            trust = trust_remote_code()
            config = load(str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=trust)
            make: Any = AutoModelForCausalLM.from_config
            with torch.device("meta"), within_bounds(specs):
                network = make(config, trust_remote_code=trust)
            tensors = read(str(path), return_tensors=True, model_to_load=network)["tensors"]
        except UnknownNetworkError:
            raise
        except Exception as error:  # whatever goes wrong in other people's classes, from what is in the file
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
