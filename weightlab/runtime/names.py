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
        UnsupportedFormatError: lists the files' tensors that are no regular part of one of the module's: nothing in
            memory is such a tensor.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    modeling = sys.modules.get("transformers.modeling_utils")  # imported by whoever made the module
    if modeling is None or not isinstance(module, modeling.PreTrainedModel):
        return state
    # Without memory: what only gets another name comes back as the same object.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    in_files = _reverted(module, stand_ins)
    renamed = {file: names[id(tensor)] for file, tensor in in_files.items() if id(tensor) in names}
    views = {file: state[name] for file, name in renamed.items()}
    converted = [name for name in state if name not in renamed.values()]
    for layer in dict.fromkeys(map(unit_of, converted)):  # one at a time: numbers take more memory than weights
        part = {name: state[name] for name in converted if unit_of(name) == layer}
        views |= _views(module, part)
    missing = [f"{file} {list(tensor.shape)}" for file, tensor in in_files.items() if file not in views]
    if missing:
        raise UnsupportedFormatError(
            f"{type(module).__name__}: tensors of its files are scattered over the module's",
            "put the patch on the checkpoint with `weightlab apply --out`, and load that",
            missing,
        )
    places = {name: index for index, name in enumerate(state)}
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(state.items())}
    order = {
        file: places[renamed.get(file) or owners[view.untyped_storage().data_ptr()]] for file, view in views.items()
    }
    return dict(sorted(views.items(), key=lambda item: order[item[0]]))


def file_order(module: nn.Module) -> list[str]:
    """The files' tensor names in the order of the modules."""
    return list(file_tensors(module))


def _reverted(module: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` would write of these tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(module, dict(state))
    return {file: found[0] if isinstance(found, list) else found for file, found in reverted.items()}


def _views(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The files' tensors that are made of these, where each is a regular part of one of them."""
    numbered: dict[str, Tensor] = {}
    begins: list[tuple[int, Tensor]] = []
    count = 0
    for name, tensor in state.items():
        numbered[name] = torch.arange(count, count + tensor.numel()).view(tensor.shape)
        begins.append((count, tensor))
        count += tensor.numel()
    views: dict[str, Tensor] = {}
    for file, places in _reverted(module, numbered).items():
        if not places.numel():
            continue
        first = int(places.reshape(-1)[0])
        sizes = list(places.shape)
        strides = [int(places.select(d, 1).reshape(-1)[0]) - first if sizes[d] > 1 else 0 for d in range(places.ndim)]
        last = first + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))
        begin, owner = next((b, t) for b, t in reversed(begins) if b <= first)
        inside = min(strides, default=0) >= 0 and last < begin + owner.numel() and owner.is_contiguous()
        if inside and torch.equal(torch.arange(count).as_strided(sizes, strides, first), places):
            views[file] = owner.as_strided(sizes, strides, owner.storage_offset() + first - begin)
    return views
