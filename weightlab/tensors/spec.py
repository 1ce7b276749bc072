"""What a tensor is: name, dtype, shape. Dtypes carry the names of the safetensors format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal
from unicodedata import category

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of the safetensors format.

    `kind` is "float" for those with arithmetic and "opaque" for those that are only copied or patched exactly
    (integers, booleans, complex, sub-byte and scale types). `limit` is the smallest magnitude that no longer
    rounds to a finite value of the dtype (the largest finite value plus half a unit in its last place).
    """

    name: str
    bits: int
    torch: torch.dtype | None
    kind: Literal["float", "opaque"]
    limit: float = math.inf

    @property
    def itemsize(self) -> int:
        """Bytes an element; sub-byte dtypes have none of their own and count as 1."""
        return max(1, self.bits // 8)


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 64, torch.float64, "float"),
        DType("F32", 32, torch.float32, "float", (2.0 - 2.0**-24) * 2.0**127),
        DType("BF16", 16, torch.bfloat16, "float", (2.0 - 2.0**-8) * 2.0**127),
        DType("F16", 16, torch.float16, "float", 65520.0),
        DType("F8_E4M3", 8, torch.float8_e4m3fn, "float", 464.0),
        DType("F8_E5M2", 8, torch.float8_e5m2, "float", 61440.0),
        DType("F8_E4M3FNUZ", 8, torch.float8_e4m3fnuz, "float", 248.0),
        DType("F8_E5M2FNUZ", 8, torch.float8_e5m2fnuz, "float", 61440.0),
        DType("C64", 64, torch.complex64, "opaque"),
        DType("I64", 64, torch.int64, "opaque"),
        DType("U64", 64, torch.uint64, "opaque"),
        DType("I32", 32, torch.int32, "opaque"),
        DType("U32", 32, torch.uint32, "opaque"),
        DType("I16", 16, torch.int16, "opaque"),
        DType("U16", 16, torch.uint16, "opaque"),
        DType("I8", 8, torch.int8, "opaque"),
        DType("U8", 8, torch.uint8, "opaque"),
        DType("BOOL", 8, torch.bool, "opaque"),
        DType("F8_E8M0", 8, torch.float8_e8m0fnu, "opaque"),
        DType("F6_E2M3", 6, None, "opaque"),
        DType("F6_E3M2", 6, None, "opaque"),
        DType("F4", 4, torch.float4_e2m1fn_x2, "opaque"),
    )
}
BY_TORCH: dict[torch.dtype, DType] = {d.torch: d for d in DTYPES.values() if d.torch is not None}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (a key of `DTYPES`) and shape of one tensor. A 0-d tensor has one element."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def type(self) -> DType:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * self.type.bits + 7) // 8

    @property
    def rows(self) -> int:
        """Rows of the matrix view: the first dimension (1 for 0-d and 1-d tensors)."""
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def columns(self) -> int:
        """Columns of the matrix view, all dimensions but the first in one."""
        return math.prod(self.shape[1:]) if len(self.shape) >= 2 else self.numel

    @property
    def is_float(self) -> bool:
        """Whether sums are defined on it."""
        return self.type.kind == "float"

    @property
    def stored(self) -> TensorSpec:
        """The tensor as whole bytes allow: itself, or flat bytes for sub-byte dtypes."""
        return self if self.type.bits >= 8 else TensorSpec(self.name, "U8", (self.nbytes,))

    def empty(self) -> Tensor:
        """A tensor of this dtype and shape, with any content; torch counts two elements of F4 as one."""
        assert self.type.torch is not None
        shape = (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == "F4" else self.shape
        return torch.empty(self.nbytes, dtype=torch.uint8).view(self.type.torch).reshape(shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def is_name(name: object) -> bool:
    """Whether a tensor can be called so: no empty text, no control characters, no halves of characters.

    Anything else is a name, dots, slashes and colons included: nothing is ever made of it but a key.
    """
    if not isinstance(name, str) or not name:
        return False
    return name.isprintable() or not any(category(c) in ("Cc", "Cs") for c in name)  # what prints has neither


def compute_dtype(*specs: TensorSpec) -> torch.dtype:
    """The dtype that sums are made in: fp64 when any input is fp64, else fp32."""
    return torch.float64 if any(s.dtype == "F64" for s in specs) else torch.float32
