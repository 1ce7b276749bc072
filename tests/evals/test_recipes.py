"""Recipes: those of the project read, and small ones run on models of a Hub's cache and on local ones."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import weightlab as wl
from weightlab.errors import InputError, MissingInputError, UsageError

pytest.importorskip("lm_eval", reason="lm_eval is in the extra lm")

from weightlab_evals.recipes import read_recipe, run_recipe

from tests.evals.lm.machine import model, tasks, tuned

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval and datasets warn of themselves
MANIFESTS = sorted((Path(__file__).parents[2] / "manifests").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_those_of_the_project(path: Path) -> None:
    recipe = read_recipe(path)
    if recipe.kind == "transfer":
        assert all(len(m.revision) == 40 for m in recipe.models.values())
        rows = {"target_base", "transferred", "target_tuned"}
    else:
        rows = {row for name in recipe.models for row in (name, f"{name}*", f"FT({name})")}
    assert {row for task in recipe.tasks for row in task.paper} <= rows


def test_there_are_recipes() -> None:
    assert len(MANIFESTS) >= 4


def recipe(folder: Path, **changes: Any) -> Path:
    hub = {name: {"repo": f"org/{name}", "revision": "v1"} for name in ("source_base", "source_tuned", "target_base")}
    task = {"task": "letters", "metric": "acc,none", "paper": {"target_base": 20.0, "transferred": 80.0}}
    content = {"kind": "transfer", "about": "Small ones", "models": hub, "tasks": [task], **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_a_transfer_from_a_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    base = model(tmp_path / "base")
    three = {"source_base": base, "source_tuned": tuned(base, tmp_path / "t"), "target_base": tmp_path / "v2"}
    shutil.copytree(base, tmp_path / "v2")
    shutil.copy(tuned(base, tmp_path / "x", seed=7, change=0.05) / "model.safetensors", tmp_path / "v2")
    cache = tmp_path / "hub"
    for name in ("source_base", "source_tuned"):
        home = cache / f"models--org--{name}"
        shutil.copytree(three[name], home / "snapshots" / ("a" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    read, work, own = read_recipe(recipe(tmp_path)), tmp_path / "work", tasks(tmp_path / "tasks")
    local = {"target_base": three["target_base"]}
    scores = run_recipe(read, work, local, limit=12, tasks=own)
    assert [(s.row, s.paper) for s in scores] == [("target_base", 20.0), ("transferred", 80.0)]
    wl.transfer(base, three["source_tuned"], three["target_base"], tmp_path / "expected")
    written = (work / "transferred" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "expected" / "model.safetensors").read_bytes()

    # What is there already is used again; another limit is scored anew.
    (work / "scores" / "transferred.json").write_text('{"conditions": {"limit": 12}, "found": {"letters": 41.5}}')
    assert run_recipe(read, work, local, limit=12, tasks=own)[1].found == 41.5
    assert run_recipe(read, work, local, limit=6, tasks=own)[1].found != 41.5
    with pytest.raises(UsageError, match="no model called v3"):
        run_recipe(read, work, {"v3": base})


def test_recycling(tmp_path: Path) -> None:
    first = model(tmp_path / "m1")
    second = tmp_path / "m2"
    shutil.copytree(first, second)
    shutil.copy(tuned(first, tmp_path / "x", seed=7, change=0.05) / "model.safetensors", second)
    (tmp_path / "train.py").write_text(
        "import sys, shutil\nfrom safetensors.torch import load_file, save_file\n"
        "shutil.copytree(sys.argv[1], sys.argv[2])\nfile = sys.argv[2] + '/model.safetensors'\n"
        "save_file({n: t * 1.25 for n, t in load_file(file).items()}, file, metadata={'format': 'pt'})\n"
    )
    path = recipe(
        tmp_path,
        kind="recycle",
        models={name: {"repo": f"org/{name}", "revision": "v1"} for name in ("M1", "M2")},
        train=f"{sys.executable} {tmp_path / 'train.py'} {{start}} {{out}}",
        tasks=[{"task": "letters", "metric": "acc,none", "paper": {"M1": 1.0, "M1*": 2.0, "M2": 3.0, "M2*": 4.0}}],
    )
    local = {"M1": first, "M2": second}
    scores = run_recipe(read_recipe(path), tmp_path / "work", local, limit=12, tasks=tasks(tmp_path / "tasks"))
    assert {s.row: s.paper for s in scores} == {"M1": 1.0, "M1*": 2.0, "M2": 3.0, "M2*": 4.0}
    assert (tmp_path / "work" / "result" / "model.safetensors").exists()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError) as told:
        read_recipe(recipe(tmp_path, scale="much", surprise=1))
    assert {"transfer.scale", "transfer.surprise"} <= {detail.split(":")[0] for detail in told.value.offenders}
    one = {"source_base": {"repo": "a/b", "revision": "c"}, "other": {"repo": "a/b", "revision": "c"}}
    with pytest.raises(InputError) as told:
        read_recipe(recipe(tmp_path, models=one))
    assert told.value.offenders == ("source_tuned: lacking", "target_base: lacking", "other: unknown")


def test_a_metric_that_is_not_there(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    local = {"source_base": base, "source_tuned": tuned(base, tmp_path / "t"), "target_base": base}
    task = {"task": "letters", "metric": "f1", "paper": {"target_base": 20.0}}
    read = read_recipe(recipe(tmp_path, tasks=[task]))
    with pytest.raises(InputError, match="letters: no metric f1"):
        run_recipe(read, tmp_path / "work", local, limit=4, tasks=tasks(tmp_path / "tasks"))
