"""The study of one model and seed, step by step; what each step found is kept, so that a run goes on where it stopped.

Version 2 is version 1 trained further on plays. A ladder of them lies ever further from version 1, in units of how far
fine-tuning went; the one twice as far is *the* version 2.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightlab as wl
from weightlab.files.atomic import atomic_file, atomic_folder
from weightlab.files.digest import bytes_digest
from weightlab_evals.lm.barrier import barrier
from weightlab_evals.transfer import begin, controls, languages, scores, texts, training
from weightlab_evals.transfer.begin import Model
from weightlab_evals.transfer.languages import Language

LADDER, MAIN = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), 2.0
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
WATCHED = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80)
CONTROLS = ("permuted", "neurons only", "never trained")
_HELD_OUT = 128
"""Blocks of held-out plays."""
_POINTS = 11
Say = Callable[[str], None]


class Study:
    """One model and seed.

    Args:
        packages: folders of unpacked packages by name: `model`, `news`, `plays`.
        folder: where checkpoints and findings are kept, apart for every text of this study's code.
        ladder: how far version 2 is from version 1, in units of how far fine-tuning went; rising.
        main: the one of them that is version 2 in the table.
        limit: only so many articles to choose by and to test with.

    Attributes:
        id: of all that decides what is found.
        tasks: the folder with lm_eval's tasks.
    """

    def __init__(
        self,
        model: Model,
        seed: int,
        packages: dict[str, Path],
        folder: Path,
        say: Say = print,
        ladder: Sequence[float] = LADDER,
        main: float = MAIN,
        limit: int | None = None,
    ) -> None:
        self._model, self._seed, self._packages, self._say = model, seed, packages, say
        self._ladder, self._main = ladder, main
        self.id = study_id(model)
        self._shared = folder / self.id
        self._folder = self._shared / str(seed)
        self._folder.mkdir(parents=True, exist_ok=True)
        parts = texts.split(texts.articles(packages["news"]), seed)
        self._parts = texts.Split(parts.train, parts.choose[:limit], parts.test[:limit])
        self.tasks = scores.write_tasks(self._parts, self._folder / "tasks")

    def run(self) -> dict[str, Any]:
        """Everything: the table, the ladder, the controls, the barrier, fine-tuning that goes on."""
        chosen = self._once("scale", self._choose_scale)
        return {
            "scale": chosen,
            "table": self._table(chosen["scale"]),
            "ladder": [self._once(f"ladder {mark:g}", partial(self._rung, mark)) for mark in self._ladder],
            "controls": {name: self._once(name, partial(self._control, name)) for name in CONTROLS},
            "barrier": self._once("barrier", self._barrier),
            "steps": {
                "v2": self._once("from v2", lambda: self._watched(self._v2())),
                "v2 + Δ": self._once("from the sum", lambda: self._watched(self._sum(1.0))),
            },
        }

    def pair(self) -> tuple[Path, Path]:
        """Version 1, and its fine-tune."""
        return self._v1, self._tuned(self._v1)

    # Checkpoints, by name: v1, tuned, v2-MARK, v2-MARK tuned.

    @property
    def _v1(self) -> Path:
        return self._made(
            self._shared / "v1", lambda folder: self._model.begin(package=self._packages["model"], out=folder)
        )

    @cached_property
    def _language(self) -> Language:
        return self._model.opened(self._v1)

    def _tuned(self, base: Path) -> Path:
        """A base fine-tuned on topics."""
        name = "tuned" if base == self._v1 else f"{base.name} tuned"

        def make(folder: Path) -> None:
            module = self._language.load(base, train=True)
            training.tune(self._language, module, self._parts.train, self._model.tune, self._seed)
            self._language.save(module, folder)

        return self._made(self._folder / name, make)

    @cached_property
    def _delta(self) -> wl.Patch:
        return wl.diff(self._v1, self._tuned(self._v1), encode="dense:fp32")

    def _v2(self, mark: float | None = None) -> Path:
        """Version 1 trained further until it is `mark` (the middle one) times as far as fine-tuning went."""
        folders = [self._folder / f"v2-{m:g}" for m in self._ladder]
        if not all(folder.exists() for folder in folders):
            unit = _length(self._v1, self._tuned(self._v1))
            module = self._language.load(self._v1, train=True)
            blocks = self._language.blocks(texts.plays(self._packages["plays"])[0])
            marks = [mark * unit for mark in self._ladder]
            walk = training.further(self._language, module, blocks, self._model.further, marks, self._seed)
            for folder, _ in zip(folders, walk, strict=True):
                self._made(folder, lambda out: self._language.save(module, out))
        return self._folder / f"v2-{self._main if mark is None else mark:g}"

    # What is found.

    def _choose_scale(self) -> dict[str, Any]:
        module = self._language.load(self._v2())
        tried = {}
        for scale in SCALES:
            with wl.patched(module, self._delta.at(scale)):
                tried[f"{scale:g}"] = self._told(module, "choose")
        return {"tried": tried, "scale": float(max(tried, key=lambda s: (tried[s], -abs(float(s) - 1))))}

    def _table(self, scale: float) -> dict[str, dict[str, float]]:
        v1, v2 = self._v1, self._v2()
        rows: dict[str, Callable[[], Path]] = {
            "v1": lambda: v1,
            "FT(v1)": lambda: self._tuned(v1),
            "v2": lambda: v2,
            "v2 + Δ": lambda: self._sum(1.0),
            "v2 + λΔ": lambda: self._sum(scale),
            "FT(v2)": lambda: self._tuned(v2),
        }
        return {name: self._once(name, partial(self._scored_when_made, folder)) for name, folder in rows.items()}

    def _sum(self, scale: float) -> Path:
        return self._made(
            self._folder / f"v2 plus {scale:g}",
            lambda out: wl.transfer(self._v1, self._tuned(self._v1), self._v2(), out, scale=scale),
            whole=False,
        )

    def _scored_when_made(self, make: Callable[[], Path]) -> dict[str, float]:
        return self._scored(make())

    def _scored(self, folder: Path) -> dict[str, float]:
        module = self._language.load(folder)
        return {"right": self._told(module), "perplexity": scores.perplexity(self._language, module, self._held_out)}

    def _rung(self, mark: float) -> dict[str, Any]:
        base = self._v2(mark)
        module = self._language.load(base)
        found = {"mark": mark, **self._forecast(base), "right": self._told(module, "few")}
        with wl.patched(module, self._delta):
            found["right with delta"] = self._told(module, "few")
        return {**found, "right when tuned": self._told(self._language.load(self._tuned(base)), "few")}

    def _control(self, name: str) -> dict[str, Any]:
        base = self._made(self._folder / name, lambda out: self._write_control(name, out))
        module = self._language.load(base)
        found = {**self._forecast(base), "right": self._told(module, "few")}
        found["perplexity"] = scores.perplexity(self._language, module, self._held_out)
        with wl.patched(module, self._delta):
            found["right with delta"] = self._told(module, "few")
        return found

    def _write_control(self, name: str, out: Path) -> None:
        v2 = self._v2()
        module = self._language.load(v2)
        if name == "never trained":
            self._language.save(controls.reinitialised(module, self._seed), out)
            return
        self._language.save(module, out)
        file = out / "model.safetensors"
        what = ("neurons",) if name == "neurons only" else ("hidden", "neurons")
        save_file(controls.permuted(load_file(file), self._seed, what), file, metadata={"format": "pt"})

    def _forecast(self, target: Path) -> dict[str, Any]:
        found = wl.connectivity(self._v1, self._tuned(self._v1), target)
        return {"lost": found.lost, **asdict(found.whole)}

    def _barrier(self) -> dict[str, Any]:
        tuned, target = self._tuned(self._v1), self._tuned(self._v2())

        def loss(module: nn.Module) -> float:
            return scores.answer_loss(self._language, module, self._parts.choose)

        found = barrier(str(self._v1), str(tuned), str(target), loss, self._language.load(tuned), _POINTS)
        return asdict(found)

    def _watched(self, start: Path) -> dict[str, float]:
        """Topics told while fine-tuning goes on at half the rate, which stays; by the number of steps."""
        curve: dict[str, float] = {}

        def look(step: int, network: nn.Module) -> None:
            if step in WATCHED:
                curve[str(step)] = scores.quickly_told_right(self._language, network, self._parts.choose)

        recipe = replace(self._model.tune, rate=self._model.tune.rate / 2, falls=False)
        module = self._language.load(start, train=True)
        training.tune(self._language, module, self._parts.train, recipe, self._seed, look)
        return curve

    # How it is kept.

    @cached_property
    def _held_out(self) -> Tensor:
        return self._language.blocks(texts.plays(self._packages["plays"])[1])[:_HELD_OUT]

    def _told(self, module: nn.Module, part: str = "test") -> float:
        return scores.told_right(self._language, module, self.tasks, part)

    def _made(self, folder: Path, make: Callable[[Path], Any], *, whole: bool = True) -> Path:
        """A folder; made if it is not there, and whole or absent."""
        if not folder.exists():
            self._say(f"{self._model.title} {self._seed}: {folder.name}")
            if not whole:
                make(folder)  # a command of weightlab, which sees to that
            else:
                with atomic_folder(folder) as temporary:
                    make(temporary)
        return folder

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '_')}.json"

    def _once(self, name: str, find: Callable[[], Any]) -> Any:
        file = self._file(name)
        if not file.exists():
            found = find()
            self._say(f"{self._model.title} {self._seed}: {name}: {json.dumps(found, ensure_ascii=False)}")
            with atomic_file(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(found))
        return json.loads(file.read_text())


def study_id(model: Model) -> str:
    """The same for the same code, settings and torch."""
    modules = (texts, languages, training, controls, scores, begin, sys.modules[__name__])
    words = [*map(inspect.getsource, modules), repr((model.tune, model.further)), torch.__version__]
    return bytes_digest("\0".join([model.title, *words]).encode())[:16]


def _length(base: Path, tuned: Path) -> float:
    """How far a tune went: the 2-norm over all tensors."""
    first, second = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    gone = sum(float((second[name].double() - first[name].double()).square().sum()) for name in first)
    return math.sqrt(gone)
