"""`sparse`: a share of the elements, the largest, or some chosen at random and rescaled (DARE, arXiv 2311.03099).

Chosen elements are stored per block of 65,536: `counts` (u32) says how many a block has, `places` (u16) where in it
they are, ascending, and `values` what they are. At least one element is kept of a tensor that has any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from weightlab.encodings._base import Buffers, DeltaReader, Expected, Parts, Plan, Spool, Tile, part_specs
from weightlab.encodings.dense import STORED, rounded, stored_dtype
from weightlab.errors import IntegrityError, RangeError, UsageError
from weightlab.tensors.largest import largest
from weightlab.tensors.spec import TensorSpec

_BLOCK = 2**16
_CHOICES = ("magnitude", "random")
_USAGE = "write sparse:SHARE[:magnitude|random[:SEED]], SHARE over 0 and up to 1"

Places = np.ndarray[Any, np.dtype[np.int64]]


class _Sparse:
    lossless = False
    example = "sparse:0.1 or sparse:0.1:random:42 (a share of the elements; random ones are rescaled by 1/share)"

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        words = list(arguments)
        try:
            share = float(words[0])
            choice = words[1] if len(words) > 1 else "magnitude"
            seed = int(words[2]) if len(words) > 2 else 0
        except (ValueError, IndexError):
            raise UsageError(f"sparse does not understand {':'.join(words)!r}", _USAGE) from None
        if not 0 < share <= 1 or choice not in _CHOICES or len(words) > (3 if choice == "random" else 2):
            raise UsageError(f"sparse does not understand {':'.join(words)!r}", _USAGE)
        return {"share": share, "choice": choice} | ({"seed": seed} if choice == "random" else {})

    def accepts(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> bool:
        return len(spec.shape) >= 2

    def expected(self, spec: TensorSpec, parameters: Mapping[str, Any]) -> dict[str, Expected]:
        return {
            "places": Expected(("U16",), (None,)),
            "values": Expected(STORED, (None,)),
            "counts": Expected(("U32",), (-(-spec.numel // _BLOCK),)),
        }

    def prepare(self, delta: DeltaReader, parameters: Mapping[str, Any], spool: Spool) -> Plan:
        spec = delta.spec
        keep = min(spec.numel, max(1, round(parameters["share"] * spec.numel)))
        dtype = stored_dtype(None, spec)
        if parameters["choice"] == "random":
            chooser: _Largest | _Random = _Random(spec, keep, parameters["seed"])
        else:
            chooser = _Largest(delta, keep)
        counts: list[int] = []
        for start, stop, values in delta.tiles():
            for begin in range(0, stop - start, _BLOCK):
                block = values[begin : begin + _BLOCK]
                places = chooser.places(start + begin, block)
                counts.append(len(places))
                spool.append("places", torch.from_numpy(places.astype(np.uint16)))
                spool.append("values", _rescaled(block[torch.from_numpy(places)], chooser.factor, dtype, spec.name))
        parts = part_specs(places=("U16", (keep,)), values=(dtype, (keep,)), counts=("U32", (len(counts),)))
        table = torch.from_numpy(np.asarray(counts, dtype=np.uint32))
        return Plan(parts, dict(parameters), small={"counts": table}, spooled=True)

    def encode(self, plan: Plan, spec: TensorSpec, tile: Tile) -> tuple[dict[str, Tensor], Tensor | None]:
        return {}, None

    def decode(self, parts: Parts, start: int, stop: int, base: Tensor, out: Tensor, buffers: Buffers) -> None:
        ends = parts.cached("ends", lambda: np.cumsum(parts.whole("counts").numpy().astype(np.int64)))
        total = int(ends[-1]) if len(ends) else 0
        if not total == parts.numel("places") == parts.numel("values"):
            raise IntegrityError(f"{parts.spec.name}: its counts, places and values disagree", "get the patch again")
        out.zero_()
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        begin, end = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        places = parts.read("places", begin, end, buffers).numpy().astype(np.int64)
        values = parts.read("values", begin, end, buffers)
        counts = parts.whole("counts").numpy()[first:last].astype(np.int64)
        places += np.repeat(np.arange(last - first, dtype=np.int64) * _BLOCK, counts)
        if places.size and (int(places[-1]) >= stop - start or (np.diff(places) <= 0).any()):
            raise IntegrityError(f"{parts.spec.name}: its places are out of order or range", "get the patch again")
        out[torch.from_numpy(places)] = values.to(out.dtype)


def _rescaled(chosen: Tensor, factor: float, dtype: str, name: str) -> Tensor:
    product = chosen * factor if factor != 1.0 else chosen
    if bool((torch.isfinite(chosen) & ~torch.isfinite(product)).any()):
        raise RangeError(
            "the delta is too large to be rescaled", "keep a larger share, or store it dense", [f"{name}: × {factor:g}"]
        )
    return rounded(product, dtype, name)


class _Largest:
    """The `keep` elements of largest magnitude; of equals at the limit, the first ones."""

    factor = 1.0

    def __init__(self, delta: DeltaReader, keep: int) -> None:
        self.limit = largest(lambda: (values for _, _, values in delta.tiles()), keep, delta.compute)
        self.left = self.limit.equals

    def places(self, start: int, block: Tensor) -> Places:
        chosen, self.left = self.limit.chosen(block, self.left)
        return np.flatnonzero(chosen).astype(np.int64)


class _Random:
    """`keep` elements, spread evenly over the blocks and chosen at random within each.

    Where the share of a block is no whole number, a random offset, one for the whole tensor, decides whether it is
    rounded up: every element is chosen with the probability keep / numel, so the rescaled delta is unbiased.
    The choice depends on the seed, the tensor's name and the block alone, so it is the same however many threads run.
    """

    def __init__(self, spec: TensorSpec, keep: int, seed: int) -> None:
        self.name, self.numel, self.keep, self.seed = spec.name, spec.numel, keep, seed
        self.factor = spec.numel / keep if keep else 1.0
        self.offset = int(self._generator("offset").integers(max(spec.numel, 1)))

    def _generator(self, purpose: str) -> np.random.Generator:
        key = blake3(f"weightlab sparse {self.seed} {purpose} {self.name}".encode()).digest(length=16)
        return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))

    def places(self, start: int, block: Tensor) -> Places:
        before, after = ((self.keep * place + self.offset) // self.numel for place in (start, start + block.numel()))
        generator = self._generator(str(start))
        chosen = generator.choice(block.numel(), size=after - before, replace=False, shuffle=False)
        return np.sort(chosen).astype(np.int64)


ENCODING = _Sparse()
