"""Networks made without weights, from a Python function or from a config.json; the order of their tensors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightlab.errors import UnknownNetworkError, UsageError
from weightlab.networks.configuration import CONFIG, class_of, configuration_of
from weightlab.networks.names import file_order
from weightlab.networks.plausible import within_bounds
from weightlab.tensors.spec import TensorSpec


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


def order_of(
    model: str | os.PathLike[str], specs: Mapping[str, TensorSpec], reference: str | None = None
) -> list[str] | None:
    """A checkpoint's tensor names in the order of its modules; None where the network is not known.

    Args:
        model: where it has a `config.json` that transformers knows, the network is made from that, without weights.
        specs: of the checkpoint.
        reference: `package.module:function` that makes the network instead.
    """
    network = network_in(model, specs) if reference is None else network_of(reference)
    return None if network is None else file_order(network)


def network_in(model: str | os.PathLike[str], specs: Mapping[str, TensorSpec]) -> nn.Module | None:
    """The network that a folder's `config.json` tells of, without weights; None where it is not known.

    Args: as for `needed_network`.

    Raises:
        MalformedFileError: the `config.json` is damaged.
    """
    return NetworkOf(model, specs)()


class NetworkOf:
    """Makes a model's network, without weights, when it is asked for.

    Args: as for `needed_network`.

    Attributes:
        why: says, when it has been asked for in vain, why it is not known; None where there is no `config.json`.
    """

    def __init__(self, model: str | os.PathLike[str], specs: Mapping[str, TensorSpec]) -> None:
        self._model, self._specs = model, specs
        self.why: UnknownNetworkError | None = None

    def __call__(self) -> nn.Module | None:
        """The network; None where it is not known.

        Raises:
            MalformedFileError: the `config.json` is damaged.
        """
        if not (Path(self._model) / CONFIG).is_file():
            return None
        try:
            return needed_network(self._model, self._specs)
        except UnknownNetworkError as error:
            self.why = error
            return None


def needed_network(
    model: str | os.PathLike[str], specs: Mapping[str, TensorSpec], architecture: str | None = None
) -> nn.Module:
    """The network that a folder's `config.json` tells of, without weights.

    No code of the model is run unless the user trusts it, nothing is fetched, and the network gets no larger than its
    tensors make plausible.

    Args:
        specs: of the files that it is for.
        architecture: the class of transformers; None: the one that the config names.

    Raises:
        UnknownNetworkError: says why it is not known.
        MissingInputError, MalformedFileError: there is no `config.json`, or it is damaged.
    """
    folder = Path(model)
    config = configuration_of(folder, specs)
    known: Any = class_of(folder, config, architecture)
    try:
        config._attn_implementation = "eager"  # which is never asked whether this machine can do it
        with torch.device("meta"), within_bounds(specs):
            made: nn.Module = known(config)
            return made
    except UnknownNetworkError:
        raise
    except Exception as error:  # whatever goes wrong in other people's classes, from what is in the file
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UnknownNetworkError(
            f"{folder}: {known.__name__} cannot be made as its config.json says", "see that file", [what]
        ) from error
