"""`low_rank`: the leading singular vectors of a matrix, by rank or by the share of energy to keep.

The delta is `left @ right`, left = U·S [rows, rank] and right = Vᵀ [rank, columns] (a convolution is a matrix with
one row an output channel). Decoding sums rank by rank in ascending order with separate multiply and add, so that it
gives the same bits everywhere; a matmul would not.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightlab.encodings._base import Buffers, DeltaReader, Expected, Parts, Plan, Spool, Tile, part_specs
from weightlab.encodings.dense import STORED, parse_dtype, rounded, stored_dtype
from weightlab.errors import UsageError
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.tiles import rectangles

_USAGE = "write low_rank:RANK or low_rank:energy:SHARE, and a dtype after it if wanted: low_rank:16:bf16"
_RANDOMISED_FROM = 1024  # smaller matrices are decomposed in full
_OVERSAMPLE = 10
_ONE_MATRIX = threading.Lock()  # a factorisation holds several copies of its matrix: one at a time


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
        rank = int(parameters.get("rank", 1))
        return rank * (spec.rows + spec.columns) < spec.numel

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        rank = parameters["rank"]
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank}")
        return {"left": Expected(STORED, (spec.rows, rank)), "right": Expected(STORED, (rank, spec.columns))}

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        spec = delta.spec
        with _ONE_MATRIX:
            left, right = factorise(delta.matrix(), parameters.get("rank"), parameters.get("energy"))
        dtype = stored_dtype(parameters.get("dtype", "fp32"), spec)
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


def factorise(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """(left, right) whose product is the best approximation of `matrix` [m, n], of a rank or of a share of energy.

    Energy is the sum of squared singular values. The rank is at least 1, also for a matrix of zeros. A large matrix
    and a small rank go through a randomised decomposition with four power iterations and a fixed seed.
    """
    smaller = min(matrix.shape)
    if rank is not None and smaller >= _RANDOMISED_FROM and (rank + _OVERSAMPLE) * 4 < smaller:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=4)
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        share = torch.cumsum(s.double() ** 2, 0)
        kept = int((share < share[-1] * (energy or 1.0)).sum()) + 1
    else:
        kept = rank
    kept = max(1, min(kept, smaller))
    return u[:, :kept] * s[:kept], vt[:kept]


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
