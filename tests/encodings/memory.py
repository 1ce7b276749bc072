"""Encodings without files: a delta in memory, its parts in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from weightlab.encodings import ENCODINGS, Tile
from weightlab.tensors.spec import DTYPES, TensorSpec, compute_dtype
from weightlab.tensors.tiles import TILE, tiles

FLOATS = sorted(name for name, dtype in DTYPES.items() if dtype.kind == "float")
SHAPES = [
    (),
    (0,),
    (1,),
    (3,),
    (50,),
    (0, 4),
    (4, 0),
    (1, 1),
    (1, 50),
    (50, 1),
    (3, 5),
    (7, 9),
    (16, 24),
    (2, 3, 3, 3),
    (1, 1, 1, 1),
]


class Delta:
    """A `DeltaReader` over a flat tensor of the compute dtype."""

    def __init__(self, spec: TensorSpec, values: Tensor) -> None:
        self.spec, self.values, self.compute = spec, values, values.dtype

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in tiles(self.spec.numel):
            yield start, stop, self.values[start:stop].clone()

    @contextmanager
    def matrix(self) -> Iterator[Tensor]:
        yield self.values.reshape(self.spec.rows, self.spec.columns).clone()


class Parts:
    """`Parts`, `Spool` and `Buffers` at once."""

    def __init__(self, spec: TensorSpec, parts: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> None:
        self.spec, self.parts, self.parameters = spec, dict(parts), parameters
        self.kept: dict[str, Any] = {}
        self.spooled: dict[str, list[Tensor]] = defaultdict(list)

    def append(self, part: str, values: Tensor) -> None:
        self.spooled[part].append(values.clone())

    def read(self, part: str, start: int, stop: int, buffers: object) -> Tensor:
        return self.parts[part].reshape(-1)[start:stop]

    def numel(self, part: str) -> int:
        return self.parts[part].numel()

    def cached(self, key: str, make: Callable[[], Any]) -> Any:
        return self.kept[key] if key in self.kept else self.kept.setdefault(key, make())

    def whole(self, part: str) -> Tensor:
        return self.parts[part]

    def buffer(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


def as_delta(values: Tensor, dtype: str = "F32", name: str = "w") -> Delta:
    """A delta of a tensor of that dtype and the values' shape."""
    spec = TensorSpec(name, dtype, tuple(values.shape))
    return Delta(spec, values.reshape(-1).to(compute_dtype(spec)))


def encoded(written: str, delta: Delta) -> Parts:
    """Encodes as asked (`quantized:4:log`), whether or not the encoding would take that tensor of its own accord.

    Checks that the parts are those that the encoding expects, and that what it says of the decoded tile is true.
    """
    name, *arguments = written.split(":")
    encoding = ENCODINGS.get(name)
    spec, room = delta.spec, Parts(delta.spec, {}, {})
    plan = encoding.prepare(delta, encoding.parse(arguments), room)
    assert plan is not None, "the encoding would rather have it dense"
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    promised: list[Tensor] = []
    for start, stop, values in delta.tiles():
        tile = Tile(start, stop, torch.zeros(stop - start), values.float(), values)
        made, approx = encoding.encode(plan, spec, tile)
        assert (approx is None) == plan.spooled
        for part, piece in made.items():
            pieces[part].append(piece)
        promised += [] if approx is None else [approx]
    stored: dict[str, Tensor] = dict(plan.small)
    for part, part_spec in plan.parts.items():
        if part not in stored:
            kind = part_spec.type.torch
            stored[part] = torch.cat([torch.empty(0, dtype=kind), *(p.reshape(-1) for p in room.spooled[part])])
            stored[part] = torch.cat([stored[part], *(p.reshape(-1) for p in pieces[part])])
            stored[part] = stored[part].reshape(part_spec.shape)
        assert stored[part].dtype == part_spec.type.torch and tuple(stored[part].shape) == part_spec.shape
    expected = encoding.expected(spec, plan.parameters)
    assert {p: expected[p].problem(s) for p, s in plan.parts.items()} == dict.fromkeys(expected, "")
    parts = Parts(spec, stored, plan.parameters)
    if promised:
        assert same(torch.cat(promised), decoded(parts, name, delta.compute))
    return parts


def decoded(parts: Parts, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The delta, flat, decoded tile by tile into memory that holds something else."""
    encoding = ENCODINGS.get(name.split(":")[0])
    out = torch.full((parts.spec.numel,), 7.25, dtype=dtype)
    for start, stop in tiles(parts.spec.numel):
        encoding.decode(parts, start, stop, torch.zeros(stop - start), out[start:stop], parts)
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def sample(shape: tuple[int, ...], dtype: str, seed: int, kind: str) -> Delta:
    """A delta as it could come from weights of that dtype: fp32 differences, or fp64 of fp64 weights."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "few":
        values = values * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "zero":
        values = values * 0.0
    elif kind == "equal":
        values = torch.full_like(values, -0.375)
    elif kind == "ties":
        values = values.round()
    elif kind == "wide":
        values = values * torch.exp2(torch.randint(-60, 60, shape, generator=generator).double())
    elif kind == "tiny":
        values = values * 2.0**-140
    return as_delta(values, dtype)


def samples(kinds: str = "normal few zero equal ties wide tiny") -> st.SearchStrategy[Delta]:
    return st.builds(
        sample,
        st.one_of(st.sampled_from(SHAPES), st.tuples(st.integers(1, 40), st.integers(1, 40))),
        st.sampled_from(FLOATS),
        st.integers(0, 2**31),
        st.sampled_from(kinds.split()),
    )


LARGE = [(TILE + 70_003,), (3, TILE // 2 + 5), (1500, 701)]
"""Shapes across the edge of a tile: a vector, rows that a tile cuts, many rows."""
