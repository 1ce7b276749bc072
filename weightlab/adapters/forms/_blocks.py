"""The UNets of Stable Diffusion 1, 2 and XL have two sets of names: those of diffusers, and those of their first code.

Either numbers the same blocks: `input_blocks.4.1` is the second block's first attention, which diffusers calls
`down_blocks.1.attentions.0`. How many layers a block has is read off the names that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_INSIDE_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_MOST = 8  # blocks, and layers in one


def other_names(modules: Iterable[str]) -> dict[str, str]:
    """{a module's name in the other set: its name here}, for a UNet of either set; empty for other networks."""
    here = list(modules)
    ours = any(name.startswith("down_blocks.") for name in here)
    layers = _layers(here, r"down_blocks\.0\.resnets\.(\d+)\..*") if ours else _layers_of_first(here)
    if not layers:
        return {}
    pairs = _pairs(layers, _attentions(here, ours, layers))
    table = dict(pairs) if ours else {theirs: mine for mine, theirs in pairs}
    inside = _INSIDE_RESNETS if ours else {theirs: mine for mine, theirs in _INSIDE_RESNETS.items()}
    found: dict[str, str] = {}
    for name in here:
        parts = name.split(".")
        for count in range(min(5, len(parts)), 0, -1):
            head, rest = ".".join(parts[:count]), ".".join(parts[count:])
            if head in table:
                resnet = "resnets" in (head if ours else table[head])
                other = inside.get(rest) if resnet else rest
                if other is not None:
                    found[f"{table[head]}.{other}" if other else table[head]] = name
                break
    return found


def _layers(names: Iterable[str], pattern: str) -> int:
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(pattern, name)) and len(match[1]) < 3]
    return min(max(numbers, default=-1) + 1, _MOST)


def _layers_of_first(names: Iterable[str]) -> int:
    """Of the first code's names: the first block ends where it samples down."""
    ends = [int(match[1]) for name in names if (match := re.fullmatch(r"input_blocks\.(\d{1,2})\.0\.op", name))]
    return min(max(min(ends, default=0) - 1, 0), _MOST)


def _attentions(names: Iterable[str], ours: bool, layers: int) -> set[int]:
    """The numbers of the blocks on the way up that have attentions: they move the sampler by one place."""
    found: set[int] = set()
    for name in names:
        if ours:
            match = re.match(r"up_blocks\.(\d{1,2})\.attentions\.", name)
            found |= {int(match[1])} if match else set()
        else:
            match = re.match(r"output_blocks\.(\d{1,2})\.1\.(norm|proj_in|proj_out|transformer_blocks)", name)
            found |= {int(match[1]) // (layers + 1)} if match else set()
    return found


def _pairs(layers: int, attentions: set[int]) -> list[tuple[str, str]]:
    """(name of diffusers, name of the first code) of all blocks that there may be."""
    pairs = list(_ENDS.items())
    for block in range(_MOST):
        for layer in range(layers):
            place = 1 + block * (layers + 1) + layer
            pairs.append((f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{place}.0"))
            pairs.append((f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{place}.1"))
        end = (block + 1) * (layers + 1)
        pairs.append((f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{end}.0.op"))
        for layer in range(layers + 1):
            place = block * (layers + 1) + layer
            pairs.append((f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{place}.0"))
            if block in attentions:
                pairs.append((f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{place}.1"))
        last = block * (layers + 1) + layers
        sampler = 2 if block in attentions else 1
        pairs.append((f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{last}.{sampler}.conv"))
    return pairs
