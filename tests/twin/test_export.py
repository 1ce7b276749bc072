"""Twins as PEFT adapters, against TwinModel."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import weightlab as wl
from tests.ops.test_lora import vllm_rules
from tests.twin.test_route import classifiers, ids, llamas  # noqa: F401
from weightlab.errors import MisfitError, UsageError

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")
peft: Any = pytest.importorskip("peft", reason="peft is an extra")


def adapted(kind: Any, out: Path, name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(kind.from_pretrained(out / "shared", **options), out / name).eval()


def test_language_models(llamas: list[Path], tmp_path: Path) -> None:  # noqa: F811
    base, *experts = llamas
    wl.twin_split(base, experts, tmp_path / "sparse", compress="sparse:0.1")
    with pytest.raises(UsageError, match="have to be factorised") as caught:
        wl.twin_export(tmp_path / "sparse", tmp_path / "out")
    assert len(caught.value.offenders) == 15  # all at once: seven in each of two layers, and the tied embedding
    assert not (tmp_path / "out").exists()
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="low_rank:4")
    done = wl.twin_export(tmp_path / "twin", tmp_path / "out", rank=32)
    assert set(done.adapters) == set(twin.names) and all(a.residual < 1e-5 for a in done.adapters.values())
    model = wl.TwinModel.from_pretrained(tmp_path / "twin")
    batch = ids(3, 99, 4, 0)
    for number, name in enumerate(twin.names):
        network = adapted(transformers.LlamaForCausalLM, tmp_path / "out", name)
        weights = torch.zeros(len(twin.names))
        weights[number] = 1.0
        with torch.no_grad():
            found, meant = network(**batch).logits, model(**batch, weights=weights).logits
            plain = model.module(**batch).logits
        assert float((found - meant).norm() / (meant - plain).norm()) < 1e-4


def test_linear_layers_are_the_same(llamas: list[Path], tmp_path: Path) -> None:  # noqa: F811
    base, *experts = llamas
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="low_rank:4")
    wl.twin_export(tmp_path / "twin", tmp_path / "out", rank=32, vllm=True)
    for name in twin.names:
        assert vllm_rules(tmp_path / "out" / name) == []
        merged = adapted(transformers.LlamaForCausalLM, tmp_path / "out", name).merge_and_unload().state_dict()
        shared = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "shared")
        with wl.patched(shared, twin.exclusive[name]):
            meant = {n: t.clone() for n, t in shared.state_dict().items()}
        linear = [n for n in meant if n.endswith("_proj.weight")]
        assert len(linear) == 14
        for n in linear:
            torch.testing.assert_close(merged[n], meant[n], rtol=1e-5, atol=1e-6)


def test_classifiers(classifiers: list[Path], tmp_path: Path) -> None:  # noqa: F811
    base, *experts = classifiers
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="low_rank:4")
    wl.twin_export(tmp_path / "twin", tmp_path / "out")  # what is too small for rank 4 is exact at its full rank
    model = wl.TwinModel.from_pretrained(tmp_path / "twin")
    batch = ids(3, 99, 4, 0)
    for number, name in enumerate(twin.names):
        labels = 5 if name == "expert3" else 2
        kind = transformers.BertForSequenceClassification
        network = adapted(kind, tmp_path / "out", name, num_labels=labels)
        weights = torch.zeros(3)
        weights[number] = 1.0
        with torch.no_grad():
            found, meant = network(**batch).logits, model(**batch, weights=weights).logits
        torch.testing.assert_close(found, meant[:, :labels], rtol=1e-3, atol=1e-4)


def test_the_shared_model_is_that_of_the_base_as_it_was(llamas: list[Path], tmp_path: Path) -> None:  # noqa: F811
    base = shutil.copytree(llamas[0], tmp_path / "base")
    wl.twin_split(base, llamas[1:], tmp_path / "twin", compress="low_rank:4")
    wl.twin_export(tmp_path / "twin", tmp_path / "before", rank=32)
    wl.apply(base, wl.diff(llamas[0], llamas[1], tmp_path / "patch.safetensors"), in_place=True)
    wl.twin_export(tmp_path / "twin", tmp_path / "after", rank=32)
    one, two = (load_file(tmp_path / name / "shared" / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()) and len(one) == len(two)


def test_a_base_with_a_classifier_of_another_size(classifiers: list[Path], tmp_path: Path) -> None:  # noqa: F811
    _, two, other, five = classifiers
    wl.twin_split(two, {"other": other, "five": five}, tmp_path / "twin", compress="low_rank:4")
    with pytest.raises(MisfitError, match="another size") as error:
        wl.twin_export(tmp_path / "twin", tmp_path / "out")
    assert list(error.value.offenders) == ["classifier.bias", "classifier.weight"] and not (tmp_path / "out").exists()
