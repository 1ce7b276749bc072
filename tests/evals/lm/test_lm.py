"""Language models scored by lm_eval with patches on in memory: the same as for models that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from weightlab_cli.main import run

import weightlab as wl
from weightlab.errors import StackError

pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")

from tests.evals.lm.machine import KINDS, model, tasks, tuned

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval and datasets warn of themselves


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(results: dict[str, Any]) -> dict[str, Any]:
    """Every answer to every request, and the metrics."""
    answers = {
        task: [(s["doc_id"], s["resps"]) for s in sorted(found, key=lambda s: s["doc_id"])]
        for task, found in results["samples"].items()
    }
    return {"answers": answers, "results": results["results"]}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_memory_are_those_of_the_written_model(tmp_path: Path, kind: str) -> None:
    from weightlab_evals.lm.model import WeightlabLM
    from weightlab_evals.lm.run import evaluate

    base = model(tmp_path / "base", kind)
    patch = wl.diff(base, tuned(base, tmp_path / "tuned"), tmp_path / "p.safetensors", encode="dense:fp32")
    loaded = WeightlabLM(pretrained=str(base), batch_size=8, device="cpu")
    clean = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    options = {"tasks": ["letters", "digits"], "task_manager": manager(tasks(tmp_path / "tasks")), "bootstrap_iters": 0}
    found = evaluate(loaded, [[], [patch], [0.5 * patch]], **options)
    assert all(torch.equal(t, clean[n]) for n, t in loaded.model.state_dict().items())
    for result, scale in zip(found, (0.0, 1.0, 0.5), strict=True):
        wl.apply(base, [scale * patch], out=tmp_path / f"out{scale}")
        written = WeightlabLM(pretrained=str(tmp_path / f"out{scale}"), batch_size=8, device="cpu")
        (other,) = evaluate(written, [[]], **options)
        assert scores(result) == scores(other)
    assert len({json.dumps(scores(r)["answers"]) for r in found}) == 3  # the patches do change answers
    on = found[2]["config"]["weightlab"]
    assert on["patches"][0]["id"] == patch.id and on["patches"][0]["scale"] == 0.5


def test_a_cache_of_answers_is_one_stacks_own(tmp_path: Path) -> None:
    import lm_eval
    from weightlab_evals.lm.model import WeightlabLM
    from weightlab_evals.lm.run import evaluate

    base = model(tmp_path / "base")
    patch = wl.diff(base, tuned(base, tmp_path / "tuned"), encode="dense:fp32")
    loaded = WeightlabLM(pretrained=str(base), batch_size=8, device="cpu")
    options = {"tasks": ["letters"], "task_manager": manager(tasks(tmp_path / "tasks")), "bootstrap_iters": 0}
    cache = str(tmp_path / "cache" / "answers")
    first = evaluate(loaded, [[], [patch]], use_cache=cache, **options)
    again = evaluate(loaded, [[patch], []], use_cache=cache, **options)
    bare = evaluate(loaded, [[], [patch]], **options)
    assert [scores(r) for r in first] == [scores(r) for r in bare] == [scores(r) for r in reversed(again)]
    assert len(list((tmp_path / "cache").glob("answers-*.db"))) == 2
    assert loaded.cache_hook.dbdict is None
    one = str(tmp_path / "one")
    lm_eval.simple_evaluate(model=loaded, use_cache=one, **options)
    with loaded.stack([patch]), pytest.raises(StackError, match="other patches"):
        lm_eval.simple_evaluate(model=loaded, use_cache=one, **options)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model(tmp_path / "base")
    patch = tmp_path / "p.safetensors"
    wl.diff(base, tuned(base, tmp_path / "tuned"), patch, encode="dense:fp32")
    words = ["eval", "lm", str(base), "--patch", f"{patch}@0.5", "--scales", "0,1,2", "-o", str(tmp_path / "out")]
    words += ["--tasks", "letters", "--include_path", str(tasks(tmp_path / "tasks")), "--limit", "8", "--device", "cpu"]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stacks"] == ["clean", "p@0.5", "p@1"]
    found = {}
    for name in ("clean", "p@0.5", "p@1"):
        (file,) = (tmp_path / "out" / name).rglob("results_*.json")
        found[name] = json.loads(file.read_text())
    assert [len(f["config"]["weightlab"]["patches"]) for f in found.values()] == [0, 1, 1]
    assert found["p@1"]["config"]["weightlab"]["patches"][0]["scale"] == 1.0
    assert found["clean"]["n-samples"]["letters"]["effective"] == 8
    assert run(["eval", "lm", str(base), "--no-such-option"]) == 2
    assert run([*words, "--dry-run"]) == 0 and "would score: the clean model" in capsys.readouterr().out
