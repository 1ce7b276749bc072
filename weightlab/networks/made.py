"""Networks made without weights, from a Python function or from a config.json; the order of their tensors."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightlab.errors import UsageError
from weightlab.networks.names import file_order


def network_of(reference: str) -> nn.Module:
    """The network that a Python function makes: `package.module:function`, looked for in the current folder too.

    Raises:
        UsageError: there is no such function, or it makes no `nn.Module`.
    """
    place, sign, name = reference.partition(":")
    if not sign or not place or not name:
        raise UsageError(f"--model {reference} is not understood", "write MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--model {reference}: {error}", "write MODULE:FUNCTION, both as Python imports them"
        ) from error
    try:
        network = function()
    except Exception as error:  # the user's own code
        raise UsageError(
            f"--model {reference} failed: {type(error).__name__}: {error}", "mend that function"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--model {reference} gives {type(network).__name__}", "give a function that returns an nn.Module"
        )
    return network


def order_of(model: str | os.PathLike[str], reference: str | None = None) -> list[str] | None:
    """A checkpoint's tensor names in the order of its modules; None where the network is not known.

    Args:
        model: where it has a `config.json` that transformers knows, the network is made from that, without weights.
        reference: `package.module:function` that makes the network instead.
    """
    network = network_in(model) if reference is None else network_of(reference)
    return None if network is None else file_order(network)


def network_in(model: str | os.PathLike[str], architecture: str | None = None) -> nn.Module | None:
    """The network that a folder's `config.json` tells of, without weights; None where transformers does not know it.

    Args:
        architecture: the class of transformers; None: the one that the config names.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file() or find_spec("transformers") is None:
        return None
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, OSError):  # no model of transformers
        return None
    known: Any = getattr(transformers, architecture or (config.architectures or [""])[0], None)
    if known is None:
        return None
    with torch.device("meta"):
        made: nn.Module = known(config)
        return made
