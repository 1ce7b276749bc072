"""Real checkpoints and real fine-tunes of them: exact patches give every bit, and lossy ones say how far they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import weightlab as wl
from tests.conftest import tensors_of
from tests.encodings.memory import same
from tests.patches.tools import read
from weightlab.errors import NamesMismatchError
from weightlab.stream.executor import Resources


def check_exact(base: Path, tuned: Path, out: Path, most: float) -> None:
    """Patch and base give the tuned tensors bit for bit; its parts take at most that share of the tuned bytes."""
    patch = wl.diff(base, tuned, out)
    patch.verify()
    before, after = tensors_of(base), tensors_of(tuned)
    assert set(patch.records) == {n for n in after if not same(before[n], after[n])}
    assert patch.nbytes() <= most * sum(t.nbytes for t in after.values())
    found = wl.apply(before, patch)
    assert found.keys() == after.keys() and all(same(found[n], after[n]) for n in after)
    assert patch.header.base.fingerprint == wl.verify(base).identity
    assert patch.header.result is not None and patch.header.result.fingerprint == wl.verify(tuned).identity


def test_chgnet(chgnet_safetensors: Mapping[str, Path], tmp_path: Path) -> None:
    base, tuned = chgnet_safetensors["0.3.0"], chgnet_safetensors["r2scan"]
    check_exact(base, tuned, tmp_path / "p.safetensors", 0.90)
    container, header, _ = read(tmp_path / "p.safetensors")
    assert len(tensors_of(base)) == 136 and len(header["tensors"]) == 128  # the 8 that are equal take no room
    assert len(container) == 256


def test_chgnet_from_its_pickles(chgnet: Mapping[str, Path], chgnet_safetensors: Mapping[str, Path]) -> None:
    from_pickles = wl.diff(chgnet["0.3.0"], chgnet["r2scan"])
    assert from_pickles == wl.diff(chgnet_safetensors["0.3.0"], chgnet_safetensors["r2scan"])


def test_chgnet_of_another_shape(chgnet: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NamesMismatchError) as caught:
        wl.diff(chgnet["0.2.0"], chgnet["0.3.0"], tmp_path / "p.safetensors")
    assert caught.value.exit_code == 4 and len(caught.value.offenders) > 10
    assert any("shape [" in line for line in caught.value.offenders)
    assert any("only in" in line for line in caught.value.offenders)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("encode", "most", "error"),
    [
        ("dense:fp32", 1_640_000, 1e-9),
        ("dense:bf16", 830_000, 0.003),
        ("quantized:8:channel", 460_000, 0.02),
        ("quantized:4:tanh:channel", 250_000, 0.5),
        ("sparse:0.1", 285_000, 0.85),
        ("low_rank:8", 900_000, 0.85),
        ("sign", 120_000, 0.95),
    ],
)
def test_chgnet_in_every_encoding(chgnet_safetensors: Mapping[str, Path], encode: str, most: int, error: float) -> None:
    base, tuned = chgnet_safetensors["0.3.0"], chgnet_safetensors["r2scan"]
    patch = wl.diff(base, tuned, encode=[encode, "*embedding*=dense"])
    patch.verify()
    used = {r.encoding for r in patch.records.values() if "instead_of" not in r.parameters}
    assert encode.split(":")[0] in used and used <= {encode.split(":")[0], "dense"}
    assert patch.nbytes() < most
    before, after = tensors_of(base), tensors_of(tuned)
    found = wl.apply(before, patch)
    for name, record in patch.records.items():
        delta = (after[name] - before[name]).double()
        away = (found[name].double() - after[name].double()).norm() / delta.norm()
        assert record.error is not None
        rounding = 1e-6 * float(after[name].double().norm() / delta.norm())
        assert float(away) == pytest.approx(record.error.relative_l2, abs=rounding + 1e-6)
        assert record.error.relative_l2 < max(error, 0.003 if record.encoding == "dense" else 0)


def test_torchani(torchani_pairs: list[tuple[Path, Path]], tmp_path: Path) -> None:
    assert len(torchani_pairs) == 8
    for index, (base, tuned) in enumerate(torchani_pairs):
        check_exact(base, tuned, tmp_path / f"{index}.safetensors", 0.85)


def test_minilm(minilm: Path, minilm_tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(NamesMismatchError, match="--allow removed") as caught:
        wl.diff(minilm, minilm_tuned)
    assert len(caught.value.offenders) == 1 and caught.value.offenders[0].startswith(
        "embeddings.position_ids I64[1, 512]"
    )
    out = tmp_path / "p.safetensors"
    patch = wl.diff(minilm, minilm_tuned, out, allow=["removed"], resources=Resources(threads=1))
    assert patch.records["embeddings.position_ids"].encoding == "removed" and patch.header.requires == ["removed"]
    before, after = tensors_of(minilm / "model.safetensors"), tensors_of(minilm_tuned / "model.safetensors")
    found = wl.apply(before, patch)
    assert found.keys() == after.keys() and all(same(found[n], after[n]) for n in after)
    assert patch.nbytes() < 0.60 * sum(t.nbytes for t in after.values())
    wl.diff(
        minilm,
        minilm_tuned,
        tmp_path / "again.safetensors",
        allow=["removed"],
        resources=Resources(threads=4, memory=2**31),
    )
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def test_minilm_as_a_bf16_base_of_an_fp32_tune(minilm: Path, minilm_tuned: Path) -> None:
    before = {n: t.bfloat16() for n, t in tensors_of(minilm / "model.safetensors").items() if t.is_floating_point()}
    layers = {n: t for n, t in before.items() if n.startswith("encoder.layer.0.")}
    after = tensors_of(minilm_tuned / "model.safetensors")
    tuned = {n: after[n] for n in layers}
    for encode in ("exact", "dense", "quantized:4", "sparse:0.1", "low_rank:8", "sign"):
        patch = wl.diff(layers, tuned, encode=encode)
        found = wl.apply(layers, patch)
        for name in layers:
            if encode == "exact":
                assert same(found[name], tuned[name])
            else:
                assert found[name].dtype == torch.bfloat16
                assert torch.allclose(found[name].float(), tuned[name], atol=0.05)
