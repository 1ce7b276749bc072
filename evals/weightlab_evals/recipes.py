"""Recipes: experiments of papers on models of the Hub, with the figures that the papers have, as YAML files.

A recipe names models by repository and revision, says what is done with them, and which of lm_eval's tasks score the
outcome. It runs where the Hub and enough memory are; a model that is on the disk already can be given instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field

import weightlab as wl
from weightlab.errors import InputError, UsageError
from weightlab.files.atomic import atomic_file
from weightlab.files.foreign import read_json, read_yaml
from weightlab.ops.recycle import read_plan, steps_of

Say = Callable[[str], None]
_WEIGHTS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*", "*.model"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HubModel(_Strict):
    """A model of the Hub at a commit, tag or branch."""

    repo: str
    revision: str


class Task(_Strict):
    """One of lm_eval's tasks.

    Attributes:
        metric: as lm_eval names it in its results, such as `acc,none`.
        options: of `lm_eval.simple_evaluate`.
        paper: what the paper found, in percent, by row of the outcome.
    """

    task: str
    metric: str
    options: dict[str, Any] = {}
    paper: dict[str, float]


class _Recipe(_Strict):
    about: str
    models: dict[str, HubModel]
    tasks: list[Task] = Field(min_length=1)
    scale: float = 1.0
    model_args: dict[str, Any] = {}


class TransferRecipe(_Recipe):
    """A tune's difference on another base. Models: source_base, source_tuned, target_base, and target_tuned to compare.

    Rows of the outcome: `target_base`, `transferred`, `target_tuned`.
    """

    kind: Literal["transfer"]


class RecycleRecipe(_Recipe):
    """Fine-tuning done again for every release. Models: the releases, oldest first, by any names.

    Rows of the outcome: each release by its name; `NAME*`, tuned from what the last one learned (the first, or with
    the direct algorithm every one that is tuned plainly: `FT(NAME)`).

    Attributes:
        train: the command, as in a plan of `weightlab recycle`.
    """

    kind: Literal["recycle"]
    train: str
    algorithm: Literal["iterative", "direct"] = "iterative"
    encode: str = "exact"


Recipe = Annotated[TransferRecipe | RecycleRecipe, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Score:
    """One row of one task, in percent, and what the paper has there."""

    task: str
    row: str
    found: float
    paper: float


def read_recipe(path: Path) -> TransferRecipe | RecycleRecipe:
    """Reads a recipe.

    Raises:
        MissingInputError, MalformedFileError, InputError: it is none; all that is wrong is listed.
    """
    recipe: TransferRecipe | RecycleRecipe = read_yaml(path, Recipe)
    if recipe.kind == "transfer":
        wanted = {"source_base", "source_tuned", "target_base"}
        lacking, unknown = wanted - recipe.models.keys(), recipe.models.keys() - wanted - {"target_tuned"}
        if lacking or unknown:
            details = [*(f"{n}: lacking" for n in sorted(lacking)), *(f"{n}: unknown" for n in sorted(unknown))]
            raise InputError(f"{path}: not the models of a transfer", "name them as in manifests/", details)
    return recipe


def run_recipe(
    recipe: TransferRecipe | RecycleRecipe,
    work: Path,
    local: Mapping[str, Path],
    say: Say = lambda text: None,
    limit: int | None = None,
    tasks: Path | None = None,
) -> list[Score]:
    """Fetches, does and scores what a recipe says.

    Args:
        work: a folder for what is made; what is there from before is used again.
        local: models that are on the disk, by their name in the recipe.
        limit: only so many questions of a task.
        tasks: a folder with tasks of one's own.

    Raises:
        UsageError: `local` has a name that the recipe does not.
        and what the steps raise.
    """
    unknown = sorted(local.keys() - recipe.models.keys())
    if unknown:
        raise UsageError(
            f"the recipe has no model called {', '.join(unknown)}", f"its models: {', '.join(recipe.models)}"
        )
    models = {name: local[name] if name in local else _fetched(model, say) for name, model in recipe.models.items()}
    work.mkdir(parents=True, exist_ok=True)
    make = _transferred if isinstance(recipe, TransferRecipe) else _recycled
    manager = cache(partial(_manager, tasks))
    scores: list[Score] = []
    for row, folder, patches in make(recipe, models, work, say):  # type: ignore[arg-type]
        wanted = [task for task in recipe.tasks if row in task.paper]
        if not wanted:
            continue
        say(f"{row}: scored")
        kept = work / "scores" / f"{row}.json"
        found = _kept(
            kept, {"limit": limit}, partial(_scored, folder, patches, wanted, recipe.model_args, limit, manager)
        )
        scores += [Score(task.task, row, found[task.task], task.paper[row]) for task in wanted]
    return scores


_Rows = list[tuple[str, Path, list[Path]]]
"""What is scored: its row, the model's folder, and the patches that are put on it in memory."""


def _transferred(recipe: TransferRecipe, models: Mapping[str, Path], work: Path, say: Say) -> _Rows:
    out = work / "transferred"
    if not out.exists():
        say(f"target_base + {recipe.scale:g} × (source_tuned − source_base)")
        done = wl.transfer(
            models["source_base"], models["source_tuned"], models["target_base"], out, scale=recipe.scale
        )
        for note in done.notes:
            say(note)
    rows: _Rows = [("target_base", models["target_base"], []), ("transferred", out, [])]
    return rows + [("target_tuned", models["target_tuned"], [])] if "target_tuned" in models else rows


def _recycled(recipe: RecycleRecipe, models: Mapping[str, Path], work: Path, say: Say) -> _Rows:
    file, result = work / "plan.yaml", work / "result"
    plan = {
        "bases": [str(folder.absolute()) for folder in models.values()],
        "train": recipe.train,
        "work": "steps",
        "result": "result",
        "algorithm": recipe.algorithm,
        "scale": recipe.scale,
        "encode": recipe.encode,
    }
    file.write_text(yaml.safe_dump(plan))
    if not result.exists():
        wl.recycle(file, say=say)
    names = list(models)
    rows: _Rows = [(name, folder, []) for name, folder in models.items()]
    steps = steps_of(read_plan(file))
    for step in steps:
        row = f"FT({names[step.base]})" if step.name.endswith("plain") else f"{names[step.base]}*"
        if step is steps[-1]:
            rows.append((row, result, []))
        else:
            rows.append((row, models[names[step.base]], [work / "steps" / step.name / "change.safetensors"]))
    return rows


def _manager(tasks: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if tasks is None else str(tasks))


def _scored(
    folder: Path,
    patches: list[Path],
    wanted: list[Task],
    model_args: Mapping[str, Any],
    limit: int | None,
    manager: Callable[[], Any],
) -> dict[str, float]:
    """In percent, by task."""
    from weightlab_evals.lm.model import WeightlabLM
    from weightlab_evals.lm.run import evaluate

    # lm_eval would take cuda for granted.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = WeightlabLM(pretrained=str(folder), **{"device": device, **model_args})
    found = {}
    for task in wanted:
        options = {
            "tasks": [task.task],
            "task_manager": manager(),
            "limit": limit,
            "bootstrap_iters": 0,
            **task.options,
        }
        (results,) = evaluate(model, [patches], **options)
        by_metric = {**results["results"], **results.get("groups", {})}[task.task]
        if task.metric not in by_metric:
            raise InputError(f"{task.task}: no metric {task.metric}", f"it has {', '.join(map(str, by_metric))}")
        found[task.task] = 100 * float(by_metric[task.metric])
    return found


class _Scores(_Strict):
    """What was found, and how."""

    conditions: dict[str, Any]
    found: dict[str, float]


def _kept(file: Path, conditions: Mapping[str, Any], find: Callable[[], dict[str, float]]) -> dict[str, float]:
    if file.exists() and (known := read_json(file, _Scores)).conditions == conditions:
        return dict(known.found)
    found = find()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, overwrite=True) as temporary:
        temporary.write_text(json.dumps({"conditions": conditions, "found": found}))
    return found


def _fetched(model: HubModel, say: Say) -> Path:
    from huggingface_hub import snapshot_download

    say(f"{model.repo} at {model.revision}")
    return Path(snapshot_download(model.repo, revision=model.revision, allow_patterns=_WEIGHTS))
