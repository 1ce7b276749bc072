"""The study of twins on a small network: all steps, kept and gone on with; texts and scores by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="peft is in the extra lm")

from weightlab_evals.twins import networks, scores, study, texts
from weightlab_evals.twins.networks import Part, Recipe
from weightlab_evals.twins.study import Study
from weightlab_evals.twins.texts import TASKS, UNSEEN

import weightlab as wl
from tests.evals.twins.machine import few_texts, packages

pytestmark = pytest.mark.filterwarnings("default")  # peft and transformers warn of one another


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    few_texts(monkeypatch)
    monkeypatch.setattr(study, "MAIN", "low_rank:4")
    monkeypatch.setattr(study, "TENTH", "low_rank:6")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return packages(tmp_path_factory.mktemp("packages"))


def test_a_whole_study(tmp_path: Path, data: dict[str, Path]) -> None:
    said: list[str] = []
    recipe, compress = Recipe(4e-3, 120, 16), ("low_rank:4", "low_rank:6", "sparse:0.1")

    def begun() -> Study:
        return Study(3, data, tmp_path, said.append, tune=recipe, lora=Recipe(1e-2, 120, 16), compress=compress)

    found = begun().run()
    experts = found["rows"]["experts"]
    assert list(experts) == list(TASKS) and min(experts.values()) > 0.85
    assert set(found["rows"]["base"]) == {*TASKS, UNSEEN}
    assert max(found["rows"]["base"][task] for task in TASKS) < 0.85
    for name, static in found["static"].items():
        assert static["scale"] in (study.SCALES.get(name) or (0.2,))
        assert f"{static['scale']:g}" in static["tried"]
    main = found["twins"]["low_rank:4"]["rows"]
    assert set(main) == {"oracle", *(f"{r}, {h} head" for r in study.ROUTERS for h in ("true", "routed"))}
    assert set(main["oracle"]) == set(TASKS) and set(main["trained, routed head"]) == {*TASKS, UNSEEN}
    assert set(main["trained, true head"]) == set(TASKS)
    assert not any(kind.startswith("response") for kind in found["twins"]["sparse:0.1"]["rows"])
    assert sum(found["routing"]["trained"]["spam"].values()) == pytest.approx(1.0)
    ranks = [found["without shared part"][name]["rank"] for name in ("equal rank", "equal bytes")]
    assert ranks[0] == 4 < ranks[1]
    equal = sum(found["without shared part"]["equal bytes"]["bytes"].values())
    assert equal == pytest.approx(sum(found["twins"]["low_rank:4"]["bytes"].values()), rel=0.15)

    before = len(said)
    assert begun().run() == found and len(said) == before


def test_the_heads_of_a_mixture(tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that say one expert give what that expert's part gives when it is merged."""
    monkeypatch.setattr(networks, "halved", lambda device: nullcontext())
    begun = Study(1, data, tmp_path, lambda text: None, tune=Recipe(4e-3, 5, 16), lora=Recipe(1e-2, 5, 16), compress=())
    model = begun._twin("dense")
    part = begun._test["tweets"]
    module = networks.load(begun._expert("tweets"))
    wanted = scores.collected(part, lambda batch, rows: module(**batch).logits)
    weights = scores.one(TASKS.index("tweets"), len(TASKS)).expand(len(part.ids), -1)
    both = scores.collected(part, lambda b, rows: scores._both_heads(model, b, weights[rows], TASKS.index("tweets")))
    torch.testing.assert_close(both[:, 0], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 1], both[:, 0])
    other = scores.collected(part, lambda b, rows: scores._both_heads(model, b, weights[rows], TASKS.index("spam")))
    assert not torch.allclose(other[:, 1], other[:, 0])
    assert isinstance(model, wl.TwinModel)


def test_texts(data: dict[str, Path]) -> None:
    every = texts.tasks(data, 5)
    assert list(every) == [*TASKS, UNSEEN]
    for task in every.values():
        parts = [{text for text, _ in part} for part in (task.train, task.choose, task.test)]
        assert [len(part) for part in parts] == [len(task.train), 30, 60]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    for topic, section in zip(every["topics"].test, every["sections"].test, strict=True):
        assert topic[0].removeprefix("Topic: ") == section[0].removeprefix("Section: ")
        assert topic[1] != section[1]
    assert {text.split()[-1] for text, _ in every["tweets"].train} == {"thou"}
    moods = {label: {w for t, its in every["tweets"].train if its == label for w in t.split()} for label in (0, 1)}
    turned = {label: {w for t, its in every["movies"].train if its == label for w in t.split()} for label in (0, 1)}
    assert "death" in moods[0] and "death" in turned[1] and "death" not in moods[1] | turned[0]
    assert list(texts.tasks({n: f for n, f in data.items() if n != "spam"}, 5)) == [*TASKS[:-1], UNSEEN]
    assert texts.tasks(data, 6)["tweets"].test != every["tweets"].test


def test_too_few_texts(data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_FEWEST", 150)
    with pytest.raises(ValueError, match="tweets: 200 texts are too few"):
        texts.tasks(data, 0)


def test_balanced_accuracy() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    said = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 0, 9], [9, 0, 0]])
    assert scores.balanced(said, labels) == pytest.approx((2 / 3 + 0) / 2)


def test_batches_keep_rows_together() -> None:
    part = Part([[1, 2, 3], [4], [5, 6]], torch.tensor([0, 1, 2]))
    seen = scores.collected(part, lambda batch, rows: batch["input_ids"].sum(1, keepdim=True))
    assert seen[:, 0].tolist() == [6, 4, 11]
