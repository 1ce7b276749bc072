"""`low_rank`: the leading singular vectors of a matrix, by rank or by the share of energy to keep.

The delta is `left @ right`, left = U·S [rows, rank] and right = Vᵀ [rank, columns] (a convolution is a matrix with
one row an output channel). Decoding sums rank by rank in ascending order with separate multiply and add, so that it
gives the same bits everywhere; a matmul would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightlab.encodings._base import (
    Buffers,
    DeltaReader,
    Expected,
    Parts,
    Plan,
    Spool,
    Tile,
    part_specs,
    require_finite,
)
from weightlab.encodings.dense import STORED, parse_dtype, rounded, stored_dtype
from weightlab.errors import UsageError
from weightlab.tensors.spec import DTYPES, TensorSpec
from weightlab.tensors.tiles import rectangles

_USAGE = "write low_rank:RANK or low_rank:energy:SHARE, and a dtype after it if wanted: low_rank:16:bf16"
_RANDOMISED_FROM = 1024  # smaller matrices are decomposed in full
_OVERSAMPLE, _POWER_ITERATIONS = 10, 4
_BLOCK = 2**21  # elements that are in fp64 at a time


class _LowRank:
    lossless = False
    example = "low_rank:16 or low_rank:energy:0.9 (a dtype may follow: low_rank:16:bf16)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        words = list(arguments)
        result: dict[str, Any] = {}
        try:
            if words[:1] == ["energy"]:
                result["energy"] = float(words[1])
                words = words[2:]
                if not 0 < result["energy"] <= 1:
                    raise ValueError
            else:
                result["rank"] = int(words[0])
                words = words[1:]
                if result["rank"] < 1:
                    raise ValueError
        except (ValueError, IndexError):
            raise UsageError(f"low_rank does not understand {':'.join(arguments)!r}", _USAGE) from None
        if len(words) > 1:
            raise UsageError(f"low_rank does not understand {':'.join(words)!r}", _USAGE)
        if words:
            result["dtype"] = parse_dtype(words[0], "low_rank")
        return result

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        if len(spec.shape) < 2 or not spec.numel:
            return False
        return _helps(spec, min(parameters.get("rank", 1), spec.rows, spec.columns), _dtype(spec, parameters))

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        rank = parameters["rank"]
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank}")
        return {"left": Expected(STORED, (spec.rows, rank)), "right": Expected(STORED, (rank, spec.columns))}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan | None:
        spec, dtype = delta.spec, _dtype(delta.spec, parameters)
        with delta.matrix() as matrix:
            require_finite(torch.stack(torch.aminmax(matrix)), spec.name, "low_rank")
            left, right = factorise(matrix, parameters.get("rank"), parameters.get("energy"))
        if not _helps(spec, left.shape[1], dtype):  # known only now where the share of energy decides
            return None
        left, right = rounded(left, dtype, spec.name), rounded(right, dtype, spec.name)
        spool.append("left", left.contiguous())
        spool.append("right", right.contiguous())
        rank = left.shape[1]
        parts = part_specs(left=(dtype, (spec.rows, rank)), right=(dtype, (rank, spec.columns)))
        return Plan(parts, {"rank": rank}, spooled=True)

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        return {}, None

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        _product(parts.whole("left"), parts.whole("right"), start, stop, parts.spec.columns, out)


def _dtype(spec: TensorSpec, parameters: Mapping[str, Any]) -> str:
    return stored_dtype(parameters.get("dtype", "fp32"), spec)


def _helps(spec: TensorSpec, rank: int, dtype: str) -> bool:
    """Whether factors of that rank take less room than the dense delta."""
    factors = rank * (spec.rows + spec.columns) * DTYPES[dtype].itemsize
    return factors < spec.numel * DTYPES[stored_dtype(None, spec)].itemsize


def factorise(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """(left, right), fp64, whose product is nearly the best approximation of `matrix` [m, n] of a rank or an energy.

    Energy is the sum of squared singular values. The rank is at least 1, also for a matrix of zeros. A large matrix
    and a small rank go through a randomised decomposition with a fixed seed.
    """
    low, high = (float(v) for v in torch.aminmax(matrix))
    size = max(-low, high) or 1.0  # squares of very large or small elements would leave the range of fp32
    matrix = matrix / size
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    smaller = wide.shape[0]
    if rank is not None and smaller >= _RANDOMISED_FROM and (rank + _OVERSAMPLE) * 4 < smaller:
        vectors = _leading(wide, rank + _OVERSAMPLE)[:, :rank]
    else:
        vectors, energies = _spectrum(wide)
        share = torch.cumsum(energies, 0)
        noise = energies[0] * (wide.shape[1] * torch.finfo(torch.float32).eps) ** 2  # rounding errors of the elements
        if rank is None:
            rank = min(int((share < share[-1] * (energy or 1.0)).sum()) + 1, int((energies > noise).sum()))
        vectors = vectors[:, : max(1, rank)]
    rest = torch.cat([vectors.T @ block for block in _blocks(wide)], dim=1)
    if tall:
        return rest.T * size, vectors.T
    norms = rest.norm(dim=1)
    return vectors * norms * size, rest / torch.where(norms > 0, norms, 1.0)[:, None]


def _blocks(wide: Tensor) -> Iterator[Tensor]:
    """The matrix in fp64, some columns at a time: sums over very long rows would be wrong in fp32."""
    step = max(1, _BLOCK // wide.shape[0])
    for start in range(0, wide.shape[1], step):
        yield wide[:, start : start + step].double()


def _spectrum(wide: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors, as columns, and the squares of the singular values, both descending."""
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for block in _blocks(wide):
        gram.addmm_(block, block.T)
    energies, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1), energies.flip(0).clamp_min(0)


def _leading(wide: Tensor, count: int) -> Tensor:
    """Nearly the `count` leading left singular vectors: subspace iteration (arXiv 0909.4061, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], count, generator=generator, dtype=wide.dtype)
    basis = _orthonormal(wide @ start)
    for _ in range(_POWER_ITERATIONS):
        basis = _orthonormal(wide @ _orthonormal(wide.T @ basis))
    vectors, _ = _spectrum(basis.T @ wide)
    return basis.double() @ vectors


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns.double()).Q.to(columns.dtype)


def _product(left: Tensor, right: Tensor, start: int, stop: int, columns: int, out: Tensor) -> None:
    done = 0
    for first, last, begin, end in rectangles(start, stop, columns):
        size = (last - first) * (end - begin)
        block = out[done : done + size].reshape(last - first, end - begin)
        u = left[first:last].to(out.dtype)
        v = right[:, begin:end].to(out.dtype)
        block.zero_()
        product = torch.empty_like(block)
        for k in range(u.shape[1]):
            torch.mul(u[:, k : k + 1], v[k : k + 1], out=product)
            block.add_(product)
        done += size


ENCODING = _LowRank()
