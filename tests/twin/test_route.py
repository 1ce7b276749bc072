"""Loading a twin of transformers' models, routers, and generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weightlab as wl
from weightlab.errors import MalformedFileError, MisfitError, MissingInputError, UsageError, WrongBaseError
from weightlab.twin.mixture import only_largest
from weightlab.twin.model import TwinModel
from weightlab.twin.routers import ROUTERS

transformers: Any = pytest.importorskip("transformers", reason="transformers is in the extra lm")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def write(made: Any, folder: Path, seed: int) -> Path:
    """A model that is some way from its first weights."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in made.parameters() if seed else ():
        tensor.data.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A BERT without a head, and three classifiers of two, two and five classes."""
    place = tmp_path_factory.mktemp("classifiers")
    folders = []
    for seed, labels in enumerate((0, 2, 2, 5)):
        torch.manual_seed(0)
        config = transformers.BertConfig(num_labels=labels or 2, **SMALL)
        made = (transformers.BertForSequenceClassification if labels else transformers.BertForMaskedLM)(config)
        folders.append(write(made, place / (f"expert{seed}" if labels else "base"), seed))
    return folders


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("llamas")
    folders = []
    for seed in range(3):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, **SMALL)
        folders.append(write(transformers.LlamaForCausalLM(config), place / f"m{seed}", seed))
    return folders


def ids(low: int, high: int, rows: int, seed: int, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(low, high, (rows, length), generator=generator)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def texts(rows: int = 24, seed: int = 0) -> dict[str, list[dict[str, Tensor]]]:
    """Samples whose words tell whose they are."""
    return {f"expert{n}": [ids(3 + 30 * (n - 1), 33 + 30 * (n - 1), rows, seed + 10 * n)] for n in (1, 2, 3)}


def test_pooler_of_nobody_is_told(classifiers: list[Path], tmp_path: Path) -> None:
    base, *experts = classifiers
    twin = wl.twin_split(base, experts, tmp_path / "twin")
    assert twin.heads("expert3") == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"
    ]  # fmt: skip
    assert all(name.startswith("cls.") for name in twin.header.left_out) and twin.header.left_out


@pytest.mark.parametrize("compress", ["dense", "low_rank:8"])
def test_heads_of_other_sizes(classifiers: list[Path], tmp_path: Path, compress: str) -> None:
    base, *experts = classifiers
    wl.twin_split(base, experts, tmp_path / "twin", compress=compress)
    model = TwinModel.from_pretrained(tmp_path / "twin")
    batch = ids(3, 99, 6, 0)
    weights = torch.eye(3)[[0, 1, 2, 2, 1, 0]]
    found = model(**batch, weights=weights).logits
    assert found.shape == (6, 5)
    for row, expert in enumerate((0, 1, 2, 2, 1, 0)):
        alone = transformers.BertForSequenceClassification.from_pretrained(experts[expert]).eval()
        with torch.no_grad():
            meant = alone(**{key: value[row : row + 1] for key, value in batch.items()}).logits[0]
        if compress == "dense":
            torch.testing.assert_close(found[row, : len(meant)], meant, rtol=1e-4, atol=1e-4)
        assert bool((found[row, len(meant) :] == -torch.inf).all())


@pytest.mark.parametrize("kind", ROUTERS.names())
def test_routers(classifiers: list[Path], tmp_path: Path, kind: str) -> None:
    base, *experts = classifiers
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="low_rank:8")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    with pytest.raises(UsageError, match="no router"):
        model(**ids(3, 99, 2, 0))
    routed = wl.route(model, texts(120), kind=kind)
    chance = 1 / 3
    assert routed.accuracy > (0.9 if kind != "response" else chance - 0.15)
    assert routed.held_out == 72 and routed.samples == 360 and set(routed.by_expert) == set(twin.names)
    assert sum(b.samples for b in routed.calibration) == routed.held_out
    wl.save_router(routed.router, twin.path)
    again = TwinModel.from_pretrained(tmp_path / "twin")
    for number, batch in enumerate(texts(9, seed=5).values()):
        output, weights = again(**batch[0], return_routing=True)
        assert weights.shape == (9, 3) and torch.allclose(weights.sum(1), torch.ones(9))
        if kind != "response":
            assert float((weights.argmax(1) == number).float().mean()) > 0.85
        given = again(**batch[0], weights=weights)
        assert torch.equal(output.logits, given.logits)
        one = again.route(**{key: value[:1] for key, value in batch[0].items()})
        torch.testing.assert_close(one, weights[:1], rtol=1e-3, atol=1e-4)  # whoever else is in the batch


def test_a_router_for_others_is_refused(classifiers: list[Path], tmp_path: Path) -> None:
    base, *experts = classifiers
    one = wl.twin_split(base, experts, tmp_path / "one", compress="low_rank:4")
    model = TwinModel.from_pretrained(tmp_path / "one")
    wl.save_router(wl.route(model, texts(), kind="nearest").router, one.path)
    two = wl.twin_split(base, experts, tmp_path / "two", compress="low_rank:5")
    for name in ("router.json", "router.safetensors"):
        shutil.copyfile(one.path / name, two.path / name)
    with pytest.raises(MisfitError, match="other experts"):
        TwinModel.from_pretrained(two.path)
    shutil.copyfile(two.path / "router.safetensors", tmp_path / "tensors")
    wl.save_router(wl.route(model, texts(seed=1), kind="nearest").router, one.path)
    shutil.copyfile(tmp_path / "tensors", one.path / "router.safetensors")
    with pytest.raises(MalformedFileError, match="no router") as broken:
        TwinModel.from_pretrained(one.path)
    assert "another than the one" in broken.value.offenders[0]
    with torch.no_grad():
        next(model.module.parameters())[50] = torch.nan
    with pytest.raises(MisfitError, match="not finite") as unknown:
        wl.route(model, texts(), kind="nearest")
    assert unknown.value.offenders[0] == "expert1: 0" and unknown.value.offenders[1] != "expert2: 0"
    with pytest.raises(UsageError, match="not that of the experts") as error:
        wl.route(model, {"expert1": [], "expert4": []})
    assert len(error.value.offenders) == 3
    with pytest.raises(UsageError, match="too few"):
        wl.route(model, texts(2))


def test_the_base_is_looked_at(classifiers: list[Path], tmp_path: Path) -> None:
    base, *experts = classifiers
    wl.twin_split(base, experts, tmp_path / "twin")
    moved = shutil.copytree(tmp_path / "twin", tmp_path / "deep" / "down" / "twin")
    with pytest.raises(MissingInputError, match="its base is not at"):
        TwinModel.from_pretrained(moved)
    with pytest.raises(WrongBaseError, match="not the base"):
        TwinModel.from_pretrained(moved, base=experts[0])
    assert TwinModel.from_pretrained(moved, base=base).names == ["expert1", "expert2", "expert3"]
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]  # the base's own files lie in the folder


def test_generation(llamas: list[Path], tmp_path: Path) -> None:
    base, *experts = llamas
    twin = wl.twin_split(base, experts, tmp_path / "twin", compress="low_rank:8")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    batch = ids(3, 99, 3, 0, length=6)
    batch["attention_mask"][1, :3] = 0  # padded on the left
    batch["input_ids"] *= batch["attention_mask"]
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [-0.5, 1.0]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        found = model.generate(**batch, weights=weights, **options, **more)
        copies = more.get("num_return_sequences", 1)
        for row, own in enumerate(weights):
            merged = model.module
            parts = [twin.exclusive[n] * float(w) for n, w in zip(twin.names, own, strict=True)]
            own_batch = {key: value[row : row + 1] for key, value in batch.items()}
            if row == 1:  # without padding the same
                own_batch = {key: value[:, 3:] for key, value in own_batch.items()}
            with wl.patched(merged, parts):
                meant = merged.generate(**own_batch, **options, **more)
            begins = own_batch["input_ids"].shape[1]
            for copy in range(copies):
                mine = found[row * copies + copy, 6:]
                theirs = meant[copy, begins:]
                assert mine[: len(theirs)].tolist() == theirs.tolist(), (more, row)


def test_weights_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    torch.testing.assert_close(only_largest(weights, 1), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    torch.testing.assert_close(only_largest(weights, 2), torch.tensor([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9]]))
    assert torch.equal(only_largest(weights, 3), weights)
    with pytest.raises(UsageError, match="top_k"):
        only_largest(weights, 4)


def test_groups_and_what_is_wrong(llamas: list[Path], tmp_path: Path) -> None:
    base, *experts = llamas
    wl.twin_split(base, experts, tmp_path / "twin")
    model = TwinModel.from_pretrained(tmp_path / "twin")
    batch = ids(3, 99, 4, 0)
    weights = torch.rand(4, 2)
    together, used = model(**batch, weights=weights, group=True, return_routing=True)
    torch.testing.assert_close(together.logits, model(**batch, weights=weights.mean(0)).logits)
    assert used.shape == (1, 2)
    for wrong in ([1.0, 2.0, 3.0], [[[1.0, 2.0]]], [float("nan"), 0.0]):
        with pytest.raises(UsageError):
            model(**batch, weights=wrong)
    with pytest.raises(MisfitError, match="4 rows for 3 samples"):
        model(**batch, weights=torch.rand(3, 2))
