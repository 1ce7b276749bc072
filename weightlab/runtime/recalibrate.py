"""Running statistics of normalisation layers, estimated anew from data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from weightlab.errors import UsageError
from weightlab.extract.norms import STATISTICS
from weightlab.networks.names import file_tensors


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """One pass over data that averages what every normalisation layer sees, each batch with the same weight.

    The module is left as it was, bit for bit; `wl.signature(..., norm="recalibrate", statistics=...)` takes the result.

    Args:
        module: what the statistics are for, with the weights that it shall have.
        batches: inputs for `module(batch)`.

    Returns:
        {name of the running mean or variance, as in the files: its new value}.

    Raises:
        UsageError: the module has no such layer, or there is no batch.
    """
    norms = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    }
    if not norms:
        raise UsageError("this network has no layer with running statistics", "there is nothing to recalibrate")
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
    modes = {m: m.training for m in module.modules()}
    momenta = {layer: layer.momentum for layer in norms.values()}
    try:
        module.eval()
        for layer in norms.values():
            layer.reset_running_stats()
            layer.momentum = None  # an average over all batches, not an exponential one
            layer.train()
        count = 0
        with torch.no_grad():
            for batch in batches:
                module(batch)
                count += 1
        if not count:
            raise UsageError("there is no data to recalibrate on", "give at least one batch")
        places = {tensor.data_ptr(): name for name, tensor in file_tensors(module).items()}
        found = [getattr(layer, part) for layer in norms.values() for part in STATISTICS]
        return {places[tensor.data_ptr()]: tensor.clone() for tensor in found}
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for part, mode in modes.items():
            part.training = mode
        with torch.no_grad():
            for name, tensor in module.named_buffers():
                tensor.copy_(buffers[name])
