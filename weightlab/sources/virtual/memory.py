"""Tensors in memory: an ordinary state dict as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from weightlab.errors import InputError
from weightlab.sources._quantised import codes_in, opaque_names
from weightlab.tensors.codes import Code
from weightlab.tensors.order import natural_key
from weightlab.tensors.spec import BY_TORCH, TensorSpec, is_name


class MemorySource:
    """A state dict. Names that share one storage entirely are one tensor with aliases.

    Args:
        state: {name: tensor}; not copied. Tensors that are not contiguous, or not on the CPU, are read through a
            copy of that one tensor.
        opaque: names on which no sums are defined, beyond those of an opaque dtype.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        label: str = "state dict",
        path: Path | None = None,
        opaque: frozenset[str] = frozenset(),
    ) -> None:
        wrong = [f"{n}: {type(t).__name__}" for n, t in state.items() if not isinstance(t, Tensor)]
        wrong += [
            f"{n}: {t.dtype}, layout {t.layout}"
            for n, t in state.items()
            if isinstance(t, Tensor) and (t.layout != torch.strided or t.dtype not in BY_TORCH or t.is_quantized)
        ]
        nameless = [repr(n) for n in state if not is_name(n)]
        if nameless:
            raise InputError(
                f"{label}: these are no names of tensors",
                "give texts that are not empty and have no control characters",
                nameless,
            )
        if wrong:
            raise InputError(f"{label}: holds values that are not plain tensors", "give a state dict of tensors", wrong)
        self.label = label
        self.path: Path | None = path
        self.tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        owners: dict[tuple[object, ...], str] = {}
        for name in sorted(state, key=natural_key):  # which of two names is the tensor does not depend on their order
            tensor = state[name]
            place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            owner = owners.setdefault(place, name) if tensor.numel() and tensor.data_ptr() else name
            if owner == name:
                self.tensors[name] = tensor.detach()
            else:
                aliases[name] = owner
        self.aliases: Mapping[str, str] = aliases
        self.specs: Mapping[str, TensorSpec] = {
            n: TensorSpec(n, BY_TORCH[t.dtype].name, _logical_shape(t)) for n, t in self.tensors.items()
        }
        self.codes: Mapping[str, Code] = codes_in(self.specs, {})
        self.opaque = opaque_names(self.specs, self.codes) | opaque
        self._copy: tuple[str | None, Tensor] = None, torch.empty(0)
        self._lock = Lock()

    def read(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self._bytes(name)[start : start + out.numel()])

    def _bytes(self, name: str) -> Tensor:
        """The tensor's bytes, flat. A copy that this takes is kept until another tensor needs one."""
        tensor = self.tensors[name]
        if tensor.is_contiguous() and tensor.device.type == "cpu":
            return _flat(tensor)
        with self._lock:
            copied, flat = self._copy
            if copied != name:
                flat = _flat(tensor.cpu().contiguous())
                self._copy = name, flat
            return flat

    def close(self) -> None:
        """Nothing to give back: the tensors belong to the caller."""


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor. One of a single element may have any stride, with which `view` fails."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _logical_shape(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2 and shape:  # two elements a byte
        return (*shape[:-1], shape[-1] * 2)
    return shape
