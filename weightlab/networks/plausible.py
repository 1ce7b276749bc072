"""How large a network may get: as large as the tensors in the files make plausible.

A configuration is a stranger's. It can ask for 10^9 layers beside a file with two tensors, and Python would make them
one by one. So its numbers are looked at before anything is made of them, and whatever is made is counted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules

from weightlab.errors import UnknownNetworkError
from weightlab.tensors.spec import TensorSpec

MODULES_A_TENSOR, MODULES = 64, 4096
"""Modules and parameters of a network: so many for each tensor in the files, and so many beside."""
ELEMENTS_A_BYTE, ELEMENTS = 8, 2**24
"""Likewise its elements. Codes of two bits are four a byte; a tied embedding counts twice."""
SIZE = 2**20
"""A number in a configuration that is no larger can do no harm, whatever it is: vocabularies are about as large."""
PARTS = 2**16
"""The same for numbers of layers, experts and heads, of which lists are made."""

_PARTS = re.compile(r"layer|depth|block|expert|head|stage|level|group|repeat")
# Of these nothing is made but tensors, which are counted.
_FREE = re.compile(
    r"(^|_)ids?$|token|theta|base|freq|seed|position|ctx|context|seq|len|window|steps|params|flos|pixels"
)
_REMEDY = "give a model whose config.json belongs to its weights"


def require_plausible(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str) -> None:
    """Checks the numbers of a configuration, at any depth.

    Args:
        specs: of the files that it is beside.

    Raises:
        UnknownNetworkError: lists those that the tensors cannot support.
    """
    largest = max((max(spec.shape, default=1) for spec in specs.values()), default=1)
    wrong: list[str] = []
    todo: list[tuple[str, Any]] = [("", dict(config))]
    while todo:
        place, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{place}.{key}" if place else key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(place, inner) for inner in value if not isinstance(inner, int)]
            todo.append((place, sum(abs(inner) for inner in value if isinstance(inner, int))))  # layers of stages
        elif isinstance(value, int) and abs(value) > _allowed(place.rpartition(".")[2], largest):
            wrong.append(f"{place} = {str(value)[:30]}")
    if wrong:
        raise UnknownNetworkError(
            f"{where}: numbers that {len(specs)} tensors with at most {largest:,} rows or columns cannot have",
            _REMEDY,
            sorted(wrong),
        )


def _allowed(key: str, largest: int) -> int:
    if _PARTS.search(key):
        return max(PARTS, largest)
    return 2**63 - 1 if _FREE.search(key) else max(SIZE, 2 * largest)


@contextmanager
def within_bounds(specs: Mapping[str, TensorSpec]) -> Iterator[None]:
    """While the block makes a network, its modules and elements are counted.

    Args:
        specs: of the files that it is for.

    Raises:
        UnknownNetworkError: it gets larger than the tensors make plausible.
    """
    modules = MODULES + MODULES_A_TENSOR * len(specs)
    elements = ELEMENTS + ELEMENTS_A_BYTE * sum(spec.nbytes for spec in specs.values())
    mine, made, grown = threading.get_ident(), 0, 0

    def count_module(owner: nn.Module, name: str, inner: nn.Module | None) -> None:
        nonlocal made
        if threading.get_ident() == mine:
            made += 1
            if made > modules:
                raise _too_large(f"more than {modules:,} modules", len(specs))

    def count_parameter(owner: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made, grown
        if threading.get_ident() == mine and parameter is not None:
            made, grown = made + 1, grown + parameter.numel()
            if grown > elements:
                raise _too_large(f"more than {elements:,} elements", len(specs))
            if made > modules:
                raise _too_large(f"more than {modules:,} modules and parameters", len(specs))

    hooks = [
        torch_modules.register_module_module_registration_hook(count_module),
        torch_modules.register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _too_large(what: str, tensors: int) -> UnknownNetworkError:
    return UnknownNetworkError(f"its config.json asks for {what}, and its files have {tensors} tensors", _REMEDY)
