"""Twins scored by lm_eval: the same as merged models, whatever else is in the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from weightlab_cli.main import run

import weightlab as wl
from weightlab.errors import UsageError

pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")

from tests.evals.lm.machine import WORDS, model, tasks, tuned
from tests.evals.lm.test_lm import manager, quiet, scores  # noqa: F401

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval and datasets warn of themselves


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    base = model(tmp_path / "base", dtype=torch.float32)
    experts = {name: tuned(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)}
    wl.twin_split(base, experts, tmp_path / "twin", compress="dense:fp32")
    return tmp_path / "twin"


def close(found: dict[str, Any], meant: dict[str, Any]) -> bool:
    """Whether all likelihoods are near, and all that was generated is the same."""
    near = [
        (float(a[0][0]), float(b[0][0]))
        for task in ("letters",)
        for (_, x), (_, y) in zip(found["answers"][task], meant["answers"][task], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    same = found["answers"]["digits"] == meant["answers"]["digits"]
    return same and all(a == pytest.approx(b, abs=1e-3) for a, b in near)


def test_weights_by_hand_are_merged_models(twin: Path, tmp_path: Path) -> None:
    import lm_eval
    from weightlab_evals.lm.model import WeightlabLM
    from weightlab_evals.lm.run import evaluate
    from weightlab_evals.lm.twin import TwinLM

    options = {"tasks": ["letters", "digits"], "task_manager": manager(tasks(tmp_path / "tasks")), "bootstrap_iters": 0}
    opened = wl.open_twin(twin)
    wl.apply(tmp_path / "base", opened.shared, out=tmp_path / "shared")
    written = WeightlabLM(pretrained=str(tmp_path / "shared"), batch_size=8, device="cpu")
    for weights in ("1;0", [0.3, 0.9]):
        loaded = TwinLM(pretrained=str(twin), weights=weights, batch_size=8, device="cpu")
        numbers = [float(w) for w in (weights.split(";") if isinstance(weights, str) else weights)]
        patches = [opened.exclusive[n] * w for n, w in zip(opened.names, numbers, strict=True) if w]
        found = lm_eval.simple_evaluate(model=loaded, **options)
        (meant,) = evaluate(written, [patches], **options)
        assert close(scores(found), scores(meant))
        assert found["config"]["weightlab"]["weights"] == pytest.approx(numbers)
    (plain,) = evaluate(written, [[]], **options)
    assert not close(scores(found), scores(plain))


def test_the_router_sees_contexts_only(twin: Path, tmp_path: Path) -> None:
    import lm_eval
    from weightlab_evals.lm.twin import TwinLM

    with pytest.raises(UsageError, match="no router"):
        TwinLM(pretrained=str(twin), device="cpu")
    network = wl.TwinModel.from_pretrained(twin)
    batches = {}
    for name, letters in (("one", "abcde"), ("two", "fghij")):
        ids = torch.tensor([[WORDS.index("question"), WORDS.index(x), WORDS.index("?")] for x in letters])
        batches[name] = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    wl.save_router(wl.route(network, batches, kind="nearest").router, twin)
    options = {"tasks": ["letters", "digits"], "task_manager": manager(tasks(tmp_path / "tasks")), "bootstrap_iters": 0}
    found = []
    for size in (1, 7):
        loaded = TwinLM(pretrained=str(twin), batch_size=size, device="cpu")
        found.append(scores(lm_eval.simple_evaluate(model=loaded, **options)))
        assert len(loaded._contexts) == 10  # one mixture for all choices of a question, and one for each question
        assert loaded.get_model_info()["weightlab"]["router"] == "nearest"
    assert close(*found)


def test_rows_with_two_contexts(twin: Path) -> None:
    """The same tokens, cut at another place: each is scored with its own context's mixture."""
    from weightlab_evals.lm.twin import TwinLM

    loaded = TwinLM(pretrained=str(twin), weights=[0.0, 0.0], batch_size=4, device="cpu")
    requests = [(("", ""), [3, 4], [5, 6]), (("", ""), [3], [4, 5, 6]), (("", ""), [3, 4], [5, 7])]
    requests += [(("", ""), [3], [4, 5, 0, 0, 6])]  # its first three tokens, and what others are padded with
    mixtures = {(3, 4): torch.tensor([1.0, 0.0]), (3,): torch.tensor([0.0, 1.0])}
    loaded._contexts = dict(mixtures)
    answers = loaded._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (found, _) in zip(requests, answers, strict=True):
        ids = torch.tensor([context + continuation])
        logits = loaded._twin(input_ids=ids, weights=mixtures[tuple(context)]).logits[0].log_softmax(-1)
        meant = sum(float(logits[len(context) - 1 + n, token]) for n, token in enumerate(continuation))
        assert found == pytest.approx(meant, abs=1e-4)


def test_from_the_command_line(twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tasks(tmp_path / "tasks")
    words = [
        "--tasks",
        "letters",
        "--include_path",
        str(folder),
        "--limit",
        "4",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]
    given = ["--model_args", f"pretrained={twin},weights=1;0"]
    assert run(["eval", "lm", str(twin), "-o", str(tmp_path / "out"), *words, *given]) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["weightlab"]["weights"] == [1.0, 0.0]
    assert run(["eval", "lm", str(twin), "--patch", "p.safetensors", *words]) == 2
    assert "has no patches on" in capsys.readouterr().err
