"""What signatures are as files: their sizes beside full copies of large networks, and whether they come off again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import weightlab as wl

State = dict[str, Tensor]
ENCODINGS = {"fp32": "dense:fp32", "8 bits": "quantized:8", "4 bits": "quantized:4", "2 bits": "quantized:2"}
DEPTHS = (2, 4, 5, 6, 7)


def sizes(work: Path) -> dict[str, Any]:
    """Bytes on disk of signatures of the first K layers, and of a full copy; random weights in real shapes."""
    return {name: _sizes(dict(make()), work) for name, make in (("VGG-16", _vgg16), ("ResNet-50", _resnet50))}


def comes_off(state: Mapping[str, Tensor], one: wl.Patch, two: wl.Patch, work: Path) -> dict[str, bool]:
    """On a checkpoint in a folder: two on in place, the first off, the second off; and α = 0."""
    folder = work / "model"
    folder.mkdir(parents=True)
    file = folder / "model.safetensors"
    save_file(dict(state), file)
    first = _sha256(file)
    paths = [work / "one.safetensors", work / "two.safetensors"]
    for patch, path in zip((one, two), paths, strict=True):
        patch.save(path)
        wl.apply(folder, path, in_place=True)
    both = _sha256(file)
    wl.remove(folder, paths[0])
    half = _sha256(file)
    wl.remove(folder, paths[1])
    zero = wl.apply(dict(state), one.at(0.0))
    same = all(torch.equal(zero[n].view(torch.uint8), t.view(torch.uint8)) for n, t in state.items() if t.ndim)
    return {
        "changed by both and by one": len({first, both, half}) == 3,
        "first SHA-256 again": _sha256(file) == first,
        "alpha 0 is the clean model": same,
    }


def _sizes(clean: State, work: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def near() -> State:
        return {
            n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in clean.items() if t.is_floating_point()
        }

    full = work / "full.safetensors"
    save_file(clean, full)
    whole = full.stat().st_size
    full.unlink()
    pretrained, robust = ({**clean, **near()} for _ in range(2))
    found: dict[str, Any] = {"full": whole}
    for depth in DEPTHS:
        for name, encoding in ENCODINGS.items():
            file = work / "signature.safetensors"
            wl.signature(pretrained, clean, robust, file, layers=f"first:{depth}", order=list(clean), encode=encoding)
            found.setdefault(name, {})[str(depth)] = file.stat().st_size
            file.unlink()
    return found


def _vgg16() -> Iterator[tuple[str, Tensor]]:
    """13 convolutions, and a head from 512 to 10 as for CIFAR-10."""
    before, place = 3, 0
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in widths:
            yield f"features.{place}.weight", torch.randn(width, before, 3, 3)
            yield f"features.{place}.bias", torch.randn(width)
            before, place = width, place + 2
        place += 1
    yield "classifier.weight", torch.randn(10, 512)
    yield "classifier.bias", torch.randn(10)


def _resnet50() -> Iterator[tuple[str, Tensor]]:
    """A stem, 16 bottlenecks, and a head to 200 classes as for Tiny-ImageNet."""
    yield "conv1.weight", torch.randn(64, 3, 7, 7)
    yield from _norm("bn1", 64)
    before = 64
    for stage, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for place, (out, into, side) in enumerate(
                ((width, before, 1), (width, width, 3), (4 * width, width, 1)), 1
            ):
                yield f"{at}.conv{place}.weight", torch.randn(out, into, side, side)
                yield from _norm(f"{at}.bn{place}", out)
            if not block:
                yield f"{at}.downsample.0.weight", torch.randn(4 * width, before, 1, 1)
                yield from _norm(f"{at}.downsample.1", 4 * width)
            before = 4 * width
    yield "fc.weight", torch.randn(200, before)
    yield "fc.bias", torch.randn(200)


def _norm(name: str, width: int) -> Iterator[tuple[str, Tensor]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", torch.rand(width)
    yield f"{name}.num_batches_tracked", torch.tensor(1)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
