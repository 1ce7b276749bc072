"""Checkpoints with a tensor of every dtype, in one file or in shards, and patches of every encoding for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weightlab.files.container import build_header, layout
from weightlab.tensors.spec import DTYPES, TensorSpec

Raw = dict[str, tuple[TensorSpec, bytes]]
"""{name: (what it is, its bytes)}: also of dtypes that torch does not have."""

FLOATS = [n for n, d in DTYPES.items() if d.kind == "float"]
OPAQUE = [n for n, d in DTYPES.items() if d.kind == "opaque"]
SHAPES = {"a": (6, 8), "b": (5, 4, 2)}
ENCODINGS = ["exact", "dense:fp32", "dense:bf16", "sparse:0.3", "low_rank:2", "sign", "quantized:4"]


def values(dtype: str, shape: Sequence[int], generator: torch.Generator) -> bytes:
    """Random bytes of that dtype: floats between -1 and 1, negative zeros among them; anything else at random."""
    spec = TensorSpec("", dtype, tuple(shape))
    if not spec.is_float:
        high = 2 if dtype == "BOOL" else 256
        return torch.randint(0, high, (spec.nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()
    numbers = torch.rand(spec.numel, generator=generator, dtype=torch.float64) * 2 - 1
    numbers[3::7] *= -0.0
    return numbers.to(spec.type.torch).view(torch.uint8).numpy().tobytes()


def every_dtype(seed: int = 0) -> Raw:
    """Two tensors of every dtype, and for fp32 and int64 also a 0-d, an empty and a tiny one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{part}.{dtype}": (dtype, shape) for part, shape in SHAPES.items() for dtype in DTYPES}
    for dtype in ("F32", "I64"):
        shapes |= {f"a.{dtype}.one": (dtype, ()), f"b.{dtype}.none": (dtype, (0, 4)), f"b.{dtype}.tiny": (dtype, (1,))}
    return {n: (TensorSpec(n, d, shape), values(d, shape, generator)) for n, (d, shape) in shapes.items()}


def moved(base: Raw, names: Sequence[str], seed: int) -> Raw:
    """The same with those tensors changed: floats a little, others wholly."""
    generator = torch.Generator().manual_seed(seed)
    tuned = dict(base)
    for name in names:
        spec, raw = base[name]
        new = values(spec.dtype, spec.shape, generator)
        if spec.is_float and raw:
            kind = spec.type.torch
            before = torch.frombuffer(bytearray(raw), dtype=kind).double()
            step = torch.frombuffer(bytearray(new), dtype=kind).double()
            new = (before * 0.75 + 0.25 * step).to(kind).view(torch.uint8).numpy().tobytes()
        tuned[name] = (spec, new)
    return tuned


def write(folder: Path, tensors: Raw, shards: int = 1) -> Path:
    """Writes a checkpoint: `model.safetensors`, or so many shards with their index."""
    folder.mkdir()
    names = list(tensors)
    if shards == 1:
        _write(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[index::shards]}
        _write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write(path: Path, tensors: Raw) -> None:
    specs = {n: spec for n, (spec, _) in tensors.items()}
    offsets, _ = layout(specs)
    data = b"".join(tensors[n][1] for n in sorted(specs, key=lambda n: (offsets[n], specs[n].nbytes)))
    path.write_bytes(build_header(specs, offsets, {"format": "pt"}) + data)


def in_memory(tensors: Raw) -> dict[str, Tensor]:
    """Those that torch can hold, as a state dict."""
    held = {n: (s, raw) for n, (s, raw) in tensors.items() if s.type.bits >= 8 and s.type.torch is not None}
    return {
        n: torch.frombuffer(bytearray(raw), dtype=s.type.torch).reshape(s.shape)
        if raw
        else torch.empty(s.shape, dtype=s.type.torch)
        for n, (s, raw) in held.items()
    }


def weights(folder: Path) -> dict[str, bytes]:
    """The files with tensors, whole."""
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def raw_of(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of all tensors in a folder."""
    found: dict[str, bytes] = {}
    for content in weights(folder).values():
        length = int.from_bytes(content[:8], "little")
        header: Mapping[str, dict[str, Sequence[int]]] = json.loads(content[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = content[8 + length + begin : 8 + length + end]
    return found


def copied(model: Path, to: Path) -> Path:
    """A copy of a folder's files."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to
