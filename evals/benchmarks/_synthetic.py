"""Synthetic Llama-shaped checkpoints, written block by block, never as a whole in memory.

`make` is meant to run in a process of its own (`in_child`): the peak memory of the process that starts a measured
command can show up in what the kernel reports for that command.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY, HEAD = 32_000, 64
WIDTHS = (2048, 1024, 512, 256)  # TinyLlama's, and smaller ones for models that would have few layers otherwise
FEWEST_LAYERS = 4
DEVIATION = 0.02
RELATIVE_CHANGE = 0.01
PARTIAL_SHARE = 0.05
_BLOCK = 2**22  # elements
_MADE = "made.json"

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """The tensors of a Llama of so many layers, in the order of the files, and how they fall into shards."""

    layers: int
    shard_bytes: int
    width: int = WIDTHS[0]

    @classmethod
    def for_parameters(cls, parameters: float, shard_bytes: int) -> Shape:
        """The nearest whole number of layers, of the largest width that leaves a few of them."""
        widest = [cls(0, shard_bytes, width).scaled(parameters) for width in WIDTHS]
        return next((shape for shape in widest if shape.layers >= FEWEST_LAYERS), widest[-1])

    def scaled(self, parameters: float) -> Shape:
        """With more or fewer layers, at least one; of the same width."""
        empty, one = replace(self, layers=0).parameters, replace(self, layers=1).parameters
        return replace(self, layers=max(1, round((parameters - empty) / (one - empty))))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        width, inner, shared = self.width, self.width * 11 // 4, self._shared_heads * HEAD
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            tensors |= {
                f"{prefix}input_layernorm.weight": (width,),
                f"{prefix}self_attn.q_proj.weight": (width, width),
                f"{prefix}self_attn.k_proj.weight": (shared, width),
                f"{prefix}self_attn.v_proj.weight": (shared, width),
                f"{prefix}self_attn.o_proj.weight": (width, width),
                f"{prefix}post_attention_layernorm.weight": (width,),
                f"{prefix}mlp.gate_proj.weight": (inner, width),
                f"{prefix}mlp.up_proj.weight": (inner, width),
                f"{prefix}mlp.down_proj.weight": (width, inner),
            }
        return tensors | {"model.norm.weight": (width,), "lm_head.weight": (VOCABULARY, width)}

    @property
    def _shared_heads(self) -> int:
        """The heads of keys and values: one for eight of the queries, as in TinyLlama."""
        return max(1, self.width // HEAD // 8)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def bytes(self) -> int:
        return 2 * self.parameters

    def partial(self) -> list[str]:
        """Names of the tensors that make up PARTIAL_SHARE of the bytes, spread over the layers."""
        candidates = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for kind in "qo" for i in range(self.layers)]
        count = min(len(candidates), max(1, round(PARTIAL_SHARE * self.parameters / self.width**2)))
        if count <= self.layers:
            return [candidates[i * self.layers // count] for i in range(count)]
        return candidates[:count]

    def partial_bytes(self) -> int:
        return 2 * sum(math.prod(self.tensors()[name]) for name in self.partial())

    def shards(self) -> list[list[str]]:
        """Names by shard, in order; a shard ends before the tensor that would take it over `shard_bytes`."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name, shape in self.tensors().items():
            size = 2 * math.prod(shape)
            if shards[-1] and filled + size > self.shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        return shards

    def config(self) -> dict[str, Any]:
        """A config.json that transformers and mergekit take for a LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // HEAD,
            "num_key_value_heads": self._shared_heads,
            "vocab_size": VOCABULARY,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": DEVIATION,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make(shape: Shape, base: Path, tuned: Path, partial: Path | None, change: int = 0) -> dict[str, Any]:
    """Writes base, tuned and, where asked for, the model tuned in `Shape.partial` only; in one pass.

    What was made is noted beside the base; folders made before with the same numbers are kept.

    Args:
        change: another number makes another fine-tune of the same base.

    Returns:
        Parameters, bytes, the share of bf16 values that changed, and the relative change of all matrices
        together: the norm of tuned less base over that of base.
    """
    models = [base, tuned] + ([partial] if partial else [])
    made = base.with_name(f"{base.name}.{_MADE}")  # beside the model, so that no copy of the model carries it
    wanted = {"shape": asdict(shape), "models": [model.name for model in models], "change": change}
    if made.exists() and all(model.exists() for model in models):
        noted: dict[str, Any] = json.loads(made.read_text())
        if all(noted.get(key) == value for key, value in wanted.items()):
            return noted
        made.unlink()
    for model in models:
        shutil.rmtree(model, ignore_errors=True)  # else shards of another size would stay among the new ones
    shards = shape.shards()
    weight_map: dict[str, str] = {}
    changed, squared_change, squared_base = 0, 0.0, 0.0
    touched = set(shape.partial())
    for model in models:
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(shape.config(), indent=2))
    order = {name: index for index, name in enumerate(shape.tensors())}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with ExitStack() as stack:
            files = [stack.enter_context(open(model / file_name, "wb")) for model in models]
            for file in files:
                file.write(_header(names, shape.tensors()))
            for name in names:
                for base_bits, tuned_bits in _blocks(order[name], shape.tensors()[name], change):
                    contents = [base_bits, tuned_bits, tuned_bits if name in touched else base_bits]
                    for file, bits in zip(files, contents, strict=False):
                        file.write(bits.data)
                    changed += int(np.count_nonzero(base_bits != tuned_bits))
                    if len(shape.tensors()[name]) == 1:
                        continue  # the gains, all near one, would hide the matrices in the norm
                    before, after = widened(base_bits), widened(tuned_bits)
                    squared_change += float(np.square(after - before).sum(dtype=np.float64))
                    squared_base += float(np.square(before).sum(dtype=np.float64))
    if len(shards) > 1:
        index = json.dumps({"metadata": {"total_size": shape.bytes}, "weight_map": weight_map}, indent=2)
        for model in models:
            (model / "model.safetensors.index.json").write_text(index)
    noted = wanted | {
        "parameters": shape.parameters,
        "layers": shape.layers,
        "shards": len(shards),
        "bytes": shape.bytes,
        "share_of_values_changed": changed / shape.parameters,
        "relative_change": (squared_change / squared_base) ** 0.5,
        "partial_tensors": len(touched),
        "partial_bytes": shape.partial_bytes(),
        "partial_share_of_bytes": shape.partial_bytes() / shape.bytes,
    }
    made.write_text(json.dumps(noted, indent=2))
    return noted


def _header(names: list[str], shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The safetensors header: its length in eight bytes, then JSON padded to a multiple of eight."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _blocks(index: int, shape: tuple[int, ...], number: int) -> Iterator[tuple[Bits, Bits]]:
    """(base, tuned) of one tensor, block by block.

    The base is normal. The change is a cubed normal: heavy-tailed, since fine-tuning leaves most bf16 values
    where they were and moves a few by much; normal noise of that size would change over 80 % of them.
    """
    generator = np.random.default_rng([20240229, index])
    another = np.random.default_rng([20240229, index, number])
    scale = np.float32(RELATIVE_CHANGE * DEVIATION / 15**0.5)  # E[x⁶] = 15
    left = math.prod(shape)
    while left:
        count = min(left, _BLOCK)
        weights = generator.standard_normal(count, dtype=np.float32) * np.float32(DEVIATION)
        if len(shape) == 1:
            weights += 1  # the gains of the norms
        base = _rounded(weights)
        change = generator.standard_normal(count, dtype=np.float32)
        if number:  # the first was drawn nevertheless: the base is the same for every number
            change = another.standard_normal(count, dtype=np.float32)
        change *= change * change * scale
        yield base, _rounded(widened(base) + change)
        left -= count


def _rounded(values: Floats) -> Bits:
    """float32 to the bits of bf16, to the nearest, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def widened(bits: Bits) -> Floats:
    """bf16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
