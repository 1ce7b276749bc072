"""Patches as they were written when the format was fixed: they decode to these values for ever.

Encoding must give the same bytes too, with the versions of numpy, torch and zstandard that the project is tested with.
Run as a script, this file writes the patches anew; that is right only together with a new schema.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor

import weightlab as wl
from tests.patches.tools import Tree, read
from weightlab.patches import layout
from weightlab.patches.patch import open_patch
from weightlab.tensors.workspace import Workspace

GOLDEN = Path(__file__).parent / "golden"
NAMES = {
    "dense": "dense",
    "dense-bf16": "dense:bf16",
    "quantized-linear": "quantized:4:channel",
    "quantized-log": "quantized:3:log",
    "quantized-tanh": "quantized:5:tanh",
    "sparse-largest": "sparse:0.25",
    "sparse-random": "sparse:0.25:random:7",
    "low_rank": "low_rank:1",
    "sign": "sign",
}
DELTA = torch.tensor([(i * 37 % 64 - 32) / 256 if i % 5 else 0.0 for i in range(48)]).reshape(3, 16)


def lossy_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = torch.tensor([(i * 11 % 128 - 64) / 32 for i in range(48)]).reshape(3, 16)
    return {"w": base}, {"w": base + DELTA}


def exact_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every kind of change: values of several dtypes, rows, another dtype, an added and a removed tensor."""
    count = torch.arange(700, dtype=torch.int64)
    floats = ((count * 2654435761 % 2**31 & 0x01FFFFFF) | 0x3E000000).to(torch.int32)
    moved = floats + torch.where(count < 128, 0, count * 7919 % 4096).to(torch.int32)
    base = {
        "f32": floats.view(torch.float32).reshape(7, 100),
        "bf16": (floats >> 16).to(torch.int16).view(torch.bfloat16),
        "i64": count * 3,
        "flags": count % 3 == 0,
        "rows": torch.arange(20.0).reshape(5, 4),
        "wider": torch.arange(8.0).to(torch.bfloat16),
        "gone": torch.ones(3),
    }
    tuned = {
        "f32": moved.view(torch.float32).reshape(7, 100),
        "bf16": (moved >> 16).to(torch.int16).view(torch.bfloat16),
        "i64": count * 3 + (count % 7 == 0) * 10**9,
        "flags": count % 4 == 0,
        "rows": torch.arange(28.0).reshape(7, 4) + 0.5,
        "wider": torch.arange(8.0) + 0.125,
        "new": torch.tensor(-0.0),
    }
    return base, tuned


def write(place: Path, name: str) -> None:
    if name == "exact":
        base, tuned = exact_pair()
        wl.diff(base, tuned, place, allow=["added", "removed", "rows"], notes="golden", base_name="org/base")
        return
    base, tuned = lossy_pair()
    if name == "shards":
        both = {"a": base["w"], "b": base["w"]}, {"a": tuned["w"], "b": tuned["w"] * 2}
        wl.diff(*both, place, encode="dense")
        return
    wl.diff(base, tuned, place, encode=NAMES[name])


def decoded(path: Path, name: str = "w") -> Tensor:
    patch = open_patch(path)
    patch.verify()
    out = torch.empty(patch.records[name].spec(name).numel)
    patch.encoding(name).decode(patch.parts(name), 0, len(out), torch.empty(0), out, Workspace())
    return out


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


# What each encoding makes of DELTA, in 256ths.
EXPECTED: dict[str, list[float]] = {
    "dense": (DELTA * 256).reshape(-1).tolist(),
    "dense-bf16": (DELTA * 256).reshape(-1).tolist(),
    "quantized-linear": numbers(
        """
        0 3.799999952316284 -22.799999237060547 15.199999809265137 -11.399999618530273 0 -3.799999952316284
        -30.399999618530273 7.599999904632568 -19 0 -7.599999904632568 26.600000381469727 0 -26.600000381469727 0
        -16.266666412353516 20.333332061767578 -4.066666603088379 32.53333282470703 0 -24.399999618530273
        12.199999809265137 -12.199999809265137 24.399999618530273 0 -28.46666717529297 8.133333206176758
        -20.333332061767578 16.266666412353516 0 28.46666717529297 0 -26.600000381469727 11.399999618530273 0 19
        -7.599999904632568 30.399999618530273 3.799999952316284 0 11.399999618530273 -15.199999809265137
        22.799999237060547 -3.799999952316284 0 7.599999904632568 -22.799999237060547
        """
    ),
    "quantized-log": numbers(
        """
        0 4.8821940422058105 -31 12.30235767364502 -12.30235767364502 0 0 -31 4.8821940422058105 -12.30235767364502
        0 -12.30235767364502 31 0 -31 0 -12.30235767364502 12.30235767364502 -4.8821940422058105 31 0 -31
        12.30235767364502 -12.30235767364502 31 0 -31 4.8821940422058105 -12.30235767364502 12.30235767364502 0 31 0
        -31 12.30235767364502 0 12.30235767364502 -4.8821940422058105 31 4.8821940422058105 0 12.30235767364502
        -12.30235767364502 31 -4.8821940422058105 0 4.8821940422058105 -12.30235767364502
        """
    ),
    "quantized-tanh": numbers(
        """
        0 4.113602161407471 -22.682031631469727 14.411572456359863 -12.349313735961914 0 -2.056668281555176
        -28.915071487426758 8.229329109191895 -18.54197120666504 0 -8.229329109191895 28.915071487426758 0
        -26.83395767211914 0 -16.47570037841797 20.61065673828125 -6.171066761016846 31 0 -22.682031631469727
        14.411572456359863 -12.349313735961914 24.756370544433594 0 -31 6.171066761016846 -20.61065673828125
        16.47570037841797 0 26.83395767211914 0 -26.83395767211914 10.288655281066895 0 20.61065673828125
        -6.171066761016846 31 2.056668281555176 0 12.349313735961914 -14.411572456359863 22.682031631469727
        -4.113602161407471 0 6.171066761016846 -20.61065673828125
        """
    ),
    "sparse-largest": numbers(
        """
        0 0 -22 0 0 0 0 -29 0 0 0 0 28 0 -26 0 0 0 0 31 0 -23 0 0 24 0 -30 0 0 0 0 27 0 -27 0 0 0 0 30 0 0 0 0 23 0
        0 0 0
        """
    ),
    "sparse-random": numbers(
        """
        0 0 0 0 0 0 0 0 0 0 0 -36 112 0 0 0 0 84 -24 0 0 0 56 0 0 0 0 0 0 0 0 0 0 0 40 0 0 0 0 12 0 0 0 0 -16 0 24
        -84
        """
    ),
    "low_rank": numbers(
        """
        -6.004619598388672 12.152234077453613 -7.724829196929932 14.530877113342285 -4.766079902648926
        -7.774650573730469 1.1949769258499146 -10.846758842468262 10.551956176757812 -5.260991096496582
        -9.544682502746582 -1.9269551038742065 -1.6084693670272827 6.5730366706848145 -5.755901336669922
        12.703761100769043 -11.668219566345215 23.614307403564453 -15.010942459106445 28.23650360107422
        -9.261480331420898 -15.107756614685059 2.322087526321411 -21.077499389648438 20.504634857177734
        -10.22319507598877 -18.54729461669922 -3.7444727420806885 -3.12558913230896 12.772771835327148
        -11.184907913208008 24.686037063598633 3.8064141273498535 -7.703474998474121 4.89687967300415
        -9.21133041381836 3.0212862491607666 4.928462028503418 -0.7575129270553589 6.87591552734375
        -6.689035892486572 3.335017442703247 6.050510883331299 1.2215243577957153 1.0196317434310913
        -4.166741847991943 3.6487481594085693 -8.053094863891602
        """
    ),
    "sign": numbers(
        """
        11 11 -11 11 -11 11 -11 -11 11 -11 11 -11 11 11 -11 11 -15.5625 15.5625 -15.5625 15.5625 15.5625 -15.5625
        15.5625 -15.5625 15.5625 15.5625 -15.5625 15.5625 -15.5625 15.5625 15.5625 15.5625 11.125 -11.125 11.125
        11.125 11.125 -11.125 11.125 11.125 11.125 11.125 -11.125 11.125 -11.125 11.125 11.125 -11.125
        """
    ),
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_decoding_is_pinned(name: str) -> None:
    found = decoded(GOLDEN / f"{name}.safetensors")
    assert (found.double() * 256).tolist() == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_recorded_error_is_that_of_the_pinned_values(name: str) -> None:
    error = open_patch(GOLDEN / f"{name}.safetensors").records["w"].error
    found = torch.tensor(EXPECTED[name], dtype=torch.float64) / 256 - DELTA.double().reshape(-1)
    assert error is not None
    assert error.max_abs == pytest.approx(float(found.abs().max()), rel=1e-6)
    assert error.relative_l2 == pytest.approx(float(found.norm() / DELTA.double().norm()), rel=1e-6)


@pytest.mark.parametrize("file", ["exact", "exact-small-blocks-split"])
def test_exact_gives_the_very_bits(file: str) -> None:
    """The second was written while blocks of up to a kilobyte were split too."""
    base, tuned = exact_pair()
    patch = open_patch(GOLDEN / f"{file}.safetensors")
    assert patch.header.requires == ["added", "dtype", "removed", "rows"]
    found = wl.apply(base, patch)
    assert found.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_shards() -> None:
    patch = open_patch(GOLDEN / "shards")
    assert len(patch.files) == 3
    assert torch.equal(decoded(GOLDEN / "shards", "a"), DELTA.reshape(-1))


def test_ids_are_pinned() -> None:
    ids = {p.name: open_patch(p).id[:16] for p in sorted(GOLDEN.iterdir())}
    assert ids == IDS


IDS = {
    "dense-bf16.safetensors": "b78b5e5716a0667e",
    "dense.safetensors": "144b61ff017d9cad",
    "exact-small-blocks-split.safetensors": "b1213037e6f0fbb7",
    "exact.safetensors": "46e8353d45ea957c",
    "low_rank.safetensors": "0b199c0b1e37444d",
    "quantized-linear.safetensors": "7aadccfd877d3ea6",
    "quantized-log.safetensors": "cd1cfbf33c96bf1b",
    "quantized-tanh.safetensors": "375b3b94528f6afa",
    "shards": "b5a3e3f6ca6adfde",
    "sign.safetensors": "5802da97c53eef45",
    "sparse-largest.safetensors": "0fbc77eac0cbf50d",
    "sparse-random.safetensors": "f0e7b634dfec4f8a",
}


def without_version(path: Path) -> tuple[Tree, Tree, bytes]:
    container, header, data = read(path)
    header.pop("created")
    return container, header, data


def pins() -> dict[str, str]:
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.startswith(("numpy==", "torch==", "zstandard=="))]
    return {r.name: str(r.specifier)[2:] for r in wanted if r.marker is None or r.marker.evaluate()}


@pytest.mark.parametrize("name", [*sorted(set(NAMES) - {"low_rank"}), "exact", "shards"])
def test_encoding_gives_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of low_rank: a singular value decomposition differs in its last bits between processors."""
    other = {n: (version(n), v) for n, v in pins().items() if version(n).split("+")[0] != v}
    if other:
        pytest.skip(f"encoded bytes are pinned for other versions than are installed: {other}")
    if name == "shards":
        monkeypatch.setattr(layout, "SHARD_BYTES", 200)
        write(tmp_path / "shards", name)
        for path in sorted((tmp_path / "shards").iterdir()):
            if path.suffix == ".json":
                assert json.loads(path.read_text()) == json.loads((GOLDEN / "shards" / path.name).read_text())
            else:
                assert without_version(path) == without_version(GOLDEN / "shards" / path.name)
        return
    write(tmp_path / f"{name}.safetensors", name)
    assert without_version(tmp_path / f"{name}.safetensors") == without_version(GOLDEN / f"{name}.safetensors")


def main(folder: Path) -> None:
    values: dict[str, Any] = {}
    for name in [*NAMES, "exact"]:
        write(folder / f"{name}.safetensors", name)
        if name != "exact":
            values[name] = (decoded(folder / f"{name}.safetensors").double() * 256).tolist()
    layout.SHARD_BYTES = 200
    write(folder / "shards", "shards")
    print(values, {p.name: open_patch(p).id[:16] for p in sorted(folder.iterdir())})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
