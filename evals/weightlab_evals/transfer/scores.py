"""How good the study's models are: topics told right, by lm_eval, and the perplexity of plays."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlab_evals.transfer.languages import PROMPT, Language
from weightlab_evals.transfer.texts import TOPICS, Article, Split
from weightlab_evals.transfer.training import mixed

_BATCH = 32
FEW = 400
"""Articles of the test part that the many models of a ladder are scored on."""


def write_tasks(parts: Split, folder: Path) -> Path:
    """Multiple-choice tasks for lm_eval, with their data beside them: `topics_choose`, `topics_test`, `topics_few`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, shown in {"choose": parts.choose, "test": parts.test, "few": parts.test[:FEW]}.items():
        data = folder / f"{part}.json"
        rows = [{"text": article.text, "topic": article.topic} for article in shown]
        data.write_text(json.dumps(rows))
        task = {
            "task": f"topics_{part}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": PROMPT.replace("{text}", "{{text}}"),
            "doc_to_choice": list(TOPICS),
            "doc_to_target": "topic",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        # JSON is YAML, and says line breaks plainly.
        (folder / f"topics_{part}.yaml").write_text(json.dumps(task, indent=1))
    return folder


def told_right(language: Language, module: nn.Module, tasks: Path, part: str = "test") -> float:
    """The share of articles whose topic is told right, as lm_eval scores it.

    Args:
        tasks: what `write_tasks` wrote.
    """
    import lm_eval

    found = lm_eval.evaluate(lm=language.lm(module, _BATCH), task_dict=_task(tasks, part), bootstrap_iters=0)
    return float(found["results"][f"topics_{part}"]["acc,none"])


@lru_cache(maxsize=4)
def _task(tasks: Path, part: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False).load([f"topics_{part}"])


def quickly_told_right(language: Language, module: nn.Module, shown: Sequence[Article]) -> float:
    """The same without lm_eval, for a network in training, whose products are mixed."""
    right, topics = 0, language.topics()
    with torch.no_grad(), mixed():
        for start in range(0, len(shown), _BATCH):
            batch = shown[start : start + _BATCH]
            told = language.answers(module, batch)[:, topics].argmax(1)
            right += int((told == torch.tensor([article.topic for article in batch])).sum())
    return right / len(shown)


def answer_loss(language: Language, module: nn.Module, shown: Sequence[Article]) -> float:
    """Mean cross-entropy of the topic's word, in nats."""
    total, topics = 0.0, language.topics()
    with torch.no_grad():
        for start in range(0, len(shown), _BATCH):
            batch = shown[start : start + _BATCH]
            said = language.answers(module, batch)
            total -= float(said[torch.arange(len(batch)), topics[[article.topic for article in batch]]].sum())
    return total / len(shown)


def perplexity(language: Language, module: nn.Module, blocks: Tensor) -> float:
    """exp of the mean cross-entropy on blocks; of a model that fills gaps, of the masked words (always the same)."""
    losses = []
    with torch.no_grad():
        for place, batch in enumerate(torch.split(blocks, _BATCH)):
            losses.append(float(language.text_loss(module, batch, place)) * len(batch))
    return math.exp(sum(losses) / len(blocks))
