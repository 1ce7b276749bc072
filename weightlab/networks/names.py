"""A module's tensors under the names, and in the shapes, that they have in a checkpoint's files.

The modules of transformers go by other names than their files, and keep in one tensor what the files have in several
(the experts of a layer, gate and up projection). Both ways are transformers' own: it is asked what `save_pretrained`
would write, with stand-ins for the weights, so that the answer tells where every element lies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import UnsupportedFormatError
from weightlab.tensors.layers import unit_of


def file_tensors(module: nn.Module) -> dict[str, Tensor]:
    """{name in the files: the tensor, as a view of the module's memory}, in the order of the modules.

    What is written to a view is in the module. Tied tensors are there under each of their names.

    Raises:
        UnsupportedFormatError: see `file_views`.
    """
    return {file: view for file, (_, view) in file_views(module).items()}


def file_views(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """{name in the files: (the module's name of the tensor that has it, the part of that tensor)}, likewise in order.

    Raises:
        UnsupportedFormatError: lists the files' tensors that are no regular part of one of the module's: nothing in
            memory is such a tensor.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    modeling = sys.modules.get("transformers.modeling_utils")  # imported by whoever made the module
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return {name: (name, tensor) for name, tensor in state.items()}
    # Without memory: what only gets another name comes back as the same object.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    in_files = _reverted(module, stand_ins)
    owners = {file: names[id(tensor)] for file, tensor in in_files.items() if id(tensor) in names}
    views = {file: state[name] for file, name in owners.items()}
    converted = [name for name in state if name not in owners.values()]
    for layer in dict.fromkeys(map(unit_of, converted)):  # one at a time: numbers take more memory than weights
        part = {name: state[name] for name in converted if unit_of(name) == layer}
        for file, (owner, view) in _views(module, part).items():
            owners[file], views[file] = owner, view
    missing = [f"{file} {list(tensor.shape)}" for file, tensor in in_files.items() if file not in views]
    if missing:
        raise UnsupportedFormatError(
            f"{type(module).__name__}: tensors of its files are scattered over the module's",
            "put the patch on the checkpoint with `weightlab apply --out`, and load that",
            missing,
        )
    places = {name: index for index, name in enumerate(state)}
    return {file: (owners[file], views[file]) for file in sorted(views, key=lambda file: places[owners[file]])}


def file_order(module: nn.Module) -> list[str]:
    """The files' tensor names in the order of the modules."""
    return list(file_tensors(module))


def _reverted(module: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` would write of these tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(module, dict(state))
    return {file: found[0] if isinstance(found, list) else found for file, found in reverted.items()}


def _views(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """The files' tensors that are made of these, where each is a regular part of one: {name: (its name, the part)}."""
    line = torch.arange(sum(tensor.numel() for tensor in state.values()), device="cpu")
    begins: dict[str, int] = {}
    numbered: dict[str, Tensor] = {}
    for name, tensor in state.items():
        begins[name] = sum(t.numel() for t in numbered.values())
        numbered[name] = line[begins[name] : begins[name] + tensor.numel()].view(tensor.shape)
    views: dict[str, tuple[str, Tensor]] = {}
    for file, places in _reverted(module, numbered).items():
        if not places.numel():
            continue
        first, sizes = int(places.reshape(-1)[0]), list(places.shape)
        strides = [int(places.select(d, 1).reshape(-1)[0]) - first if sizes[d] > 1 else 0 for d in range(places.ndim)]
        last = first + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))
        name = next(n for n in reversed(begins) if begins[n] <= first)
        tensor, begin = state[name], begins[name]
        inside = min(strides, default=0) >= 0 and last < begin + tensor.numel() and tensor.is_contiguous()
        if inside and torch.equal(line.as_strided(sizes, strides, first), places):
            views[file] = name, tensor.as_strided(sizes, strides, tensor.storage_offset() + first - begin)
    return views
