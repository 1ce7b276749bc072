"""The study of one seed: five experts of MiniLM, and all that can be made of them instead of keeping five models."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import weightlab as wl
from weightlab.files.digest import bytes_digest
from weightlab_evals.kept import Kept, Say
from weightlab_evals.twins import networks, scores, texts
from weightlab_evals.twins.networks import LORA, TUNE, Batch, Part, Recipe
from weightlab_evals.twins.texts import TASKS, UNSEEN

RANKS = (1, 4, 16, 30, 64)
COMPRESS = (*(f"low_rank:{rank}" for rank in RANKS), "energy:0.9", "sparse:0.1", "random:0.1")
MAIN, TENTH = "low_rank:16", "low_rank:30"
"""The one that other ways are compared with at equal bytes; and the rank at which a part has a tenth of a model."""
SCALES = {
    "task_arithmetic": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5),
    "ties:0.2": (0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "ties:0.5": (0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
}
"""Methods, TIES with its density, and how much of their result is added."""
ROUTERS = ("trained", "nearest", "response")
_SHOWN = 600
"""Training texts of each task that a router is made from."""
Row = dict[str, float]


class Study:
    """One seed.

    Args:
        packages: folders of unpacked packages: `model`, and those of `texts.PACKAGES`.
        folder: where checkpoints and findings are kept, apart for every text of this study's code.
        limit: only so many texts to choose by and to test with.
        tune, lora: how experts are trained.
        compress: how exclusive parts are stored, one twin each.
        device: where networks are trained and asked.
    """

    def __init__(
        self,
        seed: int,
        packages: Mapping[str, Path],
        folder: Path,
        say: Say = print,
        *,
        limit: int | None = None,
        tune: Recipe = TUNE,
        lora: Recipe = LORA,
        compress: tuple[str, ...] = COMPRESS,
        device: str = "cpu",
    ) -> None:
        self._seed, self._packages, self._tune, self._lora, self._compress = seed, packages, tune, lora, compress
        self._device = torch.device(device)
        self._kept = Kept(folder / study_id() / str(seed), lambda text: say(f"{seed}: {text}"))
        every = texts.tasks(packages, seed)
        cut = partial(networks.encoded, self._base)
        self._train = {name: cut(every[name].train) for name in TASKS}
        self._choose = {name: cut(every[name].choose[:limit]) for name in TASKS}
        self._test = {name: cut(task.test[:limit]) for name, task in every.items()}

    def run(self) -> dict[str, Any]:
        """Scores by row and task; what was chosen; how well was routed; bytes."""
        once = self._kept.once
        return {
            "rows": {
                "experts": once("experts", self._experts_scored),
                "base": once("base", lambda: self._all_scored(self._base)),
                "multitask": once("multitask", lambda: self._all_scored(self._multitask)),
                "full experts, hard routing": once("hard routing", self._hard_routing),
                "LoRA experts": once("lora experts", self._lora_scored),
            },
            "static": {name: once(name, partial(self._static, name)) for name in ("averaging", *SCALES)},
            "cross": once("cross", self._cross),
            "routing": {kind: once(f"routing {kind}", partial(self._routing, kind)) for kind in ROUTERS},
            "twins": {name: once(f"twin {name}", partial(self._twin_scored, name)) for name in self._compress},
            "without shared part": {
                name: once(f"without {name}", partial(self._without, name)) for name in ("equal rank", "equal bytes")
            },
            "LoRA bytes": once("lora bytes", self._lora_bytes),
            "LoRA twin": once("lora twin", self._lora_twin),
        }

    # Checkpoints and patches.

    @cached_property
    def _base(self) -> Path:
        return self._kept.made("base", lambda out: networks.write_base(self._packages["model"], out))

    def _trained(self, name: str, shown: list[Part], recipe: Recipe) -> Path:
        def make(out: Path) -> None:
            module = self._to_train()
            networks.tune(module, shown, recipe, self._seed)
            module.save_pretrained(out)

        return self._kept.made(name, make)

    def _expert(self, name: str) -> Path:
        return self._trained(f"expert {name}", [self._train[name]], self._tune)

    @property
    def _multitask(self) -> Path:
        """As many steps as all experts together."""
        steps = self._tune.steps * len(TASKS)
        recipe = Recipe(self._tune.rate, steps, self._tune.batch)
        return self._trained("multitask", [self._train[name] for name in TASKS], recipe)

    def _adapter(self, name: str) -> Path:
        def make(out: Path) -> None:
            networks.tune_lora(self._to_train(), self._train[name], self._lora, self._seed, out)

        return self._kept.made(f"adapter {name}", make)

    def _merged(self, method: str) -> wl.Patch:
        """The sum of the experts' differences, or what TIES makes of them."""
        name, _, density = method.partition(":")
        file = self._kept.folder / f"{method.replace(':', ' ')}.safetensors"
        if not file.exists():
            given = [wl.diff(self._base, self._expert(task), encode="dense:fp32") for task in TASKS]
            wl.compose(given, file, method=name, parameters={"density": float(density)} if density else None)
        return wl.open_patch(file)

    def _split(self, name: str, experts: Mapping[str, Path], compress: str, share: float | None = None) -> wl.Twin:
        """Experts taken apart; with `share` 0 their shared part is nothing."""
        parameters = None if share is None else {"lambda": share}
        return wl.open_twin(
            self._kept.made(
                f"twin {name}",
                lambda out: wl.twin_split(self._base, experts, out, compress=compress, parameters=parameters),
                whole=False,
            )
        )

    @property
    def _experts(self) -> dict[str, Path]:
        return {name: self._expert(name) for name in TASKS}

    def _twin(self, compress: str) -> wl.TwinModel:
        return self._opened(self._split(compress.replace(":", " "), self._experts, compress))

    def _opened(self, twin: wl.Twin) -> wl.TwinModel:
        return wl.TwinModel.from_pretrained(twin.path, self._base).to(self._device)

    def _load(self, folder: Path) -> Any:
        return networks.load(folder, str(self._device))

    def _to_train(self) -> Any:
        return networks.load(self._base, str(self._device), "eager")

    # What is found.

    def _all_scored(self, folder: Path) -> Row:
        module = self._load(folder)
        return {name: scores.scored(module, part) for name, part in self._test.items()}

    def _experts_scored(self) -> Row:
        return {name: scores.scored(self._load(self._expert(name)), self._test[name]) for name in TASKS}

    def _cross(self) -> dict[str, float]:
        """Each expert on the unseen task."""
        return {name: scores.scored(self._load(self._expert(name)), self._test[UNSEEN]) for name in TASKS}

    def _static(self, method: str) -> dict[str, Any]:
        """One model for all tasks, its scale chosen by the mean score over tasks; nothing is chosen of an average."""
        average = method == "averaging"
        patch = self._merged("task_arithmetic" if average else method)
        module = self._load(self._base)
        tried = {}
        for scale in (1 / len(TASKS),) if average else SCALES[method]:
            with wl.patched(module, patch.at(scale)):
                tried[scale] = sum(scores.scored(module, part) for part in self._choose.values()) / len(TASKS)
        best = max(tried, key=lambda scale: tried[scale])
        with wl.patched(module, patch.at(best)):
            row = {name: scores.scored(module, part) for name, part in self._test.items()}
        return {"scale": best, "tried": {f"{scale:g}": score for scale, score in tried.items()}, "row": row}

    def _twin_scored(self, compress: str) -> dict[str, Any]:
        model = self._twin(compress)
        rows = self._routed(model, "oracle")
        for kind in ("trained", "nearest"):
            rows |= self._routed(model, kind, self._weights(kind))
        if compress.startswith("low_rank:"):
            self._route(model, "response")
            weights = {name: self._observed(model, part) for name, part in self._test.items()}
            rows |= self._routed(model, "response", weights)
        return {"bytes": model.twin.sizes(), "rows": rows}

    def _without(self, what: str) -> dict[str, Any]:
        """Low-rank differences from the base itself, and a router that looks through the base."""
        rank = int(MAIN.partition(":")[2])
        with_shared = sum(self._twin(MAIN).twin.sizes().values())
        if what == "equal bytes":
            while self._bytes(rank + 1) * len(TASKS) <= with_shared:
                rank += 1
        model = self._opened(self._split(what, self._experts, f"low_rank:{rank}", 0.0))
        self._route(model, "trained")
        weights = {name: self._observed(model, part) for name, part in self._test.items()}
        sizes = {name: size for name, size in model.twin.sizes().items() if name != "shared"}
        rows = {**self._routed(model, "oracle"), **self._routed(model, "trained", weights)}
        return {"rank": rank, "bytes": sizes, "rows": rows}

    def _bytes(self, rank: int) -> int:
        """What a part of that rank needs, without headers."""
        shapes = [tensor.shape for tensor in load_file(self._base / "model.safetensors").values()]
        full = sum(shape.numel() for shape in shapes if len(shape) < 2)
        return 4 * (full + sum(min(rank * sum(shape), shape.numel()) for shape in shapes if len(shape) == 2))

    def _lora_scored(self) -> Row:
        row = {}
        for name in TASKS:
            module = self._load(self._base)
            with wl.patched(module, self._adapter(name)):
                row[name] = scores.scored(module, self._test[name])
        return row

    def _lora_bytes(self) -> int:
        return sum((self._adapter(name) / "adapter_model.safetensors").stat().st_size for name in TASKS)

    def _lora_twin(self) -> dict[str, Any]:
        adapters = {name: self._adapter(name) for name in TASKS}
        model = self._opened(self._split("of adapters", adapters, TENTH))
        self._route(model, "trained")
        weights = {name: self._observed(model, part) for name, part in self._test.items()}
        rows = {**self._routed(model, "oracle"), **self._routed(model, "trained", weights)}
        return {"bytes": model.twin.sizes(), "rows": rows}

    # Routing.

    def _route(self, model: wl.TwinModel, kind: str) -> wl.TwinModel:
        shown = {name: _first(part, _SHOWN, self._device) for name, part in self._train.items()}
        wl.route(model, shown, kind=kind, seed=self._seed)
        return model

    def _observed(self, model: wl.TwinModel, part: Part) -> Tensor:
        return scores.collected(part, lambda batch, rows: model.route(**batch), self._device)

    def _weights(self, kind: str) -> dict[str, Tensor]:
        """Of each task's test texts [N, T]: routers that look at hidden states say the same for all these twins,
        whose shared model is one."""
        file = self._kept.folder / f"weights {kind}.pt"
        if not file.exists():
            model = self._route(self._twin(MAIN), kind)
            torch.save({name: self._observed(model, part) for name, part in self._test.items()}, file)
        found: dict[str, Tensor] = torch.load(file, weights_only=True)
        return found

    def _routed(self, model: wl.TwinModel, kind: str, weights: Mapping[str, Tensor] | None = None) -> dict[str, Row]:
        """Rows by routing and head. None: everything goes to the true expert, and there is no unseen task."""
        rows: dict[str, Row] = {}
        for name, part in self._test.items():
            expert = TASKS.index(name) if name in TASKS else None
            if weights is None and expert is None:
                continue
            own = scores.one(expert or 0, len(TASKS)).expand(len(part.ids), -1) if weights is None else weights[name]
            for head, score in scores.mixture_scored(model, part, own, expert).items():
                if weights is not None or head == "true head":
                    rows.setdefault(f"{kind}, {head}" if weights is not None else kind, {})[name] = score
        return rows

    def _routing(self, kind: str) -> dict[str, dict[str, float]]:
        """Of each task's test texts, the share that each expert gets most of."""
        if kind == "response":
            model = self._route(self._twin(MAIN), kind)
            weights = {name: self._observed(model, part) for name, part in self._test.items()}
        else:
            weights = self._weights(kind)
        return {
            name: {expert: float((found.argmax(1) == number).float().mean()) for number, expert in enumerate(TASKS)}
            for name, found in weights.items()
        }

    def _hard_routing(self) -> Row:
        """Every text by the full expert to which the trained router gives most."""
        weights = self._weights("trained")
        modules = [self._load(self._expert(name)) for name in TASKS]
        return {name: scores.choice_scored(modules, part, weights[name].argmax(1)) for name, part in self._test.items()}


def study_id() -> str:
    """The same for the same code and settings."""
    modules = (texts, networks, scores, sys.modules[__name__])
    return bytes_digest("\0".join(map(inspect.getsource, modules)).encode())[:16]


def _first(part: Part, count: int, device: torch.device) -> Iterator[Batch]:
    for _, batch in Part(part.ids[:count], part.labels[:count]).batches(64):
        yield networks.moved(batch, device)
