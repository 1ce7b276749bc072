"""The steps of the study of signatures, spread over processes; what each finds is kept for the next time."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from _environment import cache_folder
from _signature_files import comes_off
from weightlab_evals.signatures import choosing, controls, likeness, patches, scores
from weightlab_evals.signatures.checkpoints import AUGMENTED, FURTHER, Checkpoints
from weightlab_evals.signatures.choosing import choose, choose_form
from weightlab_evals.signatures.data import CLEAN, part, split
from weightlab_evals.signatures.patches import Form, Patches
from weightlab_evals.signatures.scores import Choice, Scores

from weightlab.files.atomic import atomic_file
from weightlab.files.digest import bytes_digest

Say = Callable[[str], None]
CONTROLLED = "gaussian_noise"
"""The corruption that more seeds are spent on, which have no part in any choice."""


class Study:
    """Runs tasks, in several processes, and keeps what they find."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        corruptions: Sequence[str],
        seeds: Sequence[int],
        more_seeds: Sequence[int],
        say: Say,
    ) -> None:
        self._pool, self._say = pool, say
        self.corruptions, self.seeds, self.more_seeds = list(corruptions), list(seeds), list(more_seeds)

    @property
    def key(self) -> str:
        """Of all that the findings depend on."""
        modules = (patches, scores, likeness, choosing, controls)
        sources = [inspect.getsource(module) for module in (*modules, sys.modules[__name__])]
        seeds = repr((self.corruptions, self.seeds, self.more_seeds))
        return bytes_digest("\0".join([*sources, seeds, _checkpoints_id()]).encode())[:32]

    def network(self, network: str) -> dict[str, Any]:
        """Everything about one network."""
        self._all("corrupt", [(data, name) for data in ("mnist5k", "digits") for name in self.corruptions])
        names, seeds = self.corruptions, self.seeds
        self._all("prepare", [(network, seed) for seed in seeds])
        tried = self._all("forms", [(network, seed, name) for name in names for seed in seeds])
        by_name = {name: [tried[network, seed, name] for seed in seeds] for name in names}
        # The standard model's accuracy on clean images does not depend on the corruption.
        clean = [found["baseline"]["standard"]["clean"] for found in by_name[names[0]]]
        grids = {name: [found["forms"] for found in every] for name, every in by_name.items()}
        form, alphas, means = choose_form(grids, clean)
        asked = [(network, seed, name, asdict(form)) for name in names for seed in seeds]
        rivals = self._all("rivals", asked)
        every = {
            rival: {name: [rivals[network, seed, name, _key(asdict(form))][rival] for seed in seeds] for name in names}
            for rival in scores.RIVALS
        }
        choice = choose(form, alphas, every, clean)
        told = {"form": asdict(form), "alphas": choice.alphas}
        tests = self._all("tests", [(network, seed, name, told) for name in names for seed in seeds])
        composed = self._all("composed", [(network, seed, told) for seed in seeds])
        alike = self._all("alike", [(network, seed, names, asdict(form)) for seed in seeds])
        pairs = [(network, one, two, names, asdict(form)) for one, two in combinations(seeds, 2)]
        other_start = self._all("other_start", pairs)
        every_seed = [*seeds, *self.more_seeds]
        many = self._all("controls", [(network, seed, CONTROLLED, told) for seed in every_seed])
        return {
            "choice": told,
            "controls": list(many.values()),
            "forms": [{**asdict(f), "corrupted": mean} for f, mean in means.items()],
            "validation": {name: [found["baseline"] for found in every] for name, every in by_name.items()},
            "tests": {name: [tests[network, seed, name, _key(told)] for seed in seeds] for name in names},
            "composed": list(composed.values()),
            "alike": list(alike.values()),
            "other_start": list(other_start.values()),
        }

    def _all(self, step: str, arguments: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
        running: dict[Future[Any], tuple[Any, ...]] = {
            self._pool.submit(_kept, step, given): given for given in arguments
        }
        found = {}
        try:
            for count, future in enumerate(as_completed(running), 1):
                found[tuple(_key(v) for v in running[future])] = future.result()
                self._say(f"{arguments[0][0]}: {step} {count} of {len(running)}")
        except BaseException:
            for future in running:
                future.cancel()
            raise
        return {key: found[key] for given in arguments if (key := tuple(_key(v) for v in given)) in found}


def removal(network: str, seed: int, found: Mapping[str, Any], work: Path) -> dict[str, bool]:
    """Whether two signatures come off a file again, in the form that was chosen."""
    taken, choice = Patches(_checkpoints(network, seed)), _choice(found["choice"])
    one, two = (taken.signature(name, choice.form) for name in ("gaussian_noise", "contrast"))
    return comes_off(_checkpoints(network, seed).tuned("A"), one, two, work / network)


@contextmanager
def study(
    corruptions: Sequence[str], seeds: Sequence[int], more_seeds: Sequence[int], jobs: int, say: Say
) -> Iterator[Study]:
    """A study with that many processes of one thread each, which scale better than threads on networks so small."""
    # An ordinary SIGTERM would end this process alone, and its workers would go on with what they were given.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Study(pool, corruptions, seeds, more_seeds, say)


def _key(value: Any) -> Any:
    """A value as part of a key: JSON where it cannot be hashed."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value


def _kept(step: str, given: tuple[Any, ...]) -> Any:
    """The result of a step; from the disk if nothing that it depends on has changed."""
    modules = [patches, scores, likeness, *([controls] if step == "controls" else [])]
    sources = "".join(inspect.getsource(module) for module in modules)
    words = [step, json.dumps(given, sort_keys=True), sources, _checkpoints_id()]
    file = _folder() / "results" / f"{bytes_digest(chr(0).join(words).encode())[:32]}.json"
    if not file.exists():
        found = _STEPS[step](*given)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, overwrite=True) as temporary:
            temporary.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _folder() -> Path:
    return cache_folder() / "signatures"


def _checkpoints_id() -> str:
    return str(_checkpoints("vgg", 0).recipe_id)


@lru_cache(maxsize=16)
def _checkpoints(network: str, seed: int) -> Checkpoints:
    return Checkpoints(network, seed, _folder() / "checkpoints")


def _corrupt(data: str, corruption: str) -> int:
    return len(part(data, split(data, 0).test, corruption))


def _prepare(network: str, seed: int) -> bool:
    have = _checkpoints(network, seed)
    for domain in ("A", "B", "A 0-4", "A 5-9"):
        have.tuned(domain)
    for domain in ("A", "B"):
        have.tuned(domain, AUGMENTED)
    have.tuned("A", CLEAN, FURTHER)
    return True


def _forms(network: str, seed: int, corruption: str) -> dict[str, Any]:
    scored = Scores(_checkpoints(network, seed))
    return {"baseline": scored.baseline(corruption), "forms": scored.forms(corruption)}


def _rivals(network: str, seed: int, corruption: str, form: Mapping[str, Any]) -> dict[str, Any]:
    return dict(Scores(_checkpoints(network, seed)).rivals(corruption, Form(**form)))


def _tests(network: str, seed: int, corruption: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    return dict(Scores(_checkpoints(network, seed)).on_tests(corruption, _choice(choice)))


def _composed(network: str, seed: int, choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    return Scores(_checkpoints(network, seed)).composed(_choice(choice))


def _alike(network: str, seed: int, names: Sequence[str], form: Mapping[str, Any]) -> dict[str, Any]:
    have = _checkpoints(network, seed)
    own, *rest = (_library(network, seed, domain, names, form) for domain in ("A", "B", "A 0-4", "A 5-9"))
    moved, few, many = rest
    return {
        "ranks": {"B in A": likeness.ranks(moved, own), "digits 0-4 in digits 5-9": likeness.ranks(few, many)},
        "cosines": {
            "A and A": likeness.cosines(own, own),
            "A and B": likeness.cosines(own, moved),
            "digits 0-4 and 5-9": likeness.cosines(few, many),
        },
        "depths": likeness.depths(have, names),
    }


def _other_start(network: str, one: int, two: int, names: Sequence[str], form: Mapping[str, Any]) -> dict[str, Any]:
    first, second = (_library(network, seed, "A", names, form) for seed in (one, two))
    return {"ranks": likeness.ranks(first, second), "cosines": likeness.cosines(first, second)}


def _controls(network: str, seed: int, corruption: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    return dict(controls.controls(_checkpoints(network, seed), corruption, _choice(choice)))


def _library(network: str, seed: int, domain: str, names: Sequence[str], form: Mapping[str, Any]) -> likeness.Library:
    taken = Patches(_checkpoints(network, seed), domain)
    return {name: taken.signature(name, Form(form["depth"], "keep")) for name in names}


def _choice(told: Mapping[str, Any]) -> Choice:
    return Choice(Form(**told["form"]), told["alphas"])


_STEPS: dict[str, Callable[..., Any]] = {
    "corrupt": _corrupt,
    "prepare": _prepare,
    "forms": _forms,
    "rivals": _rivals,
    "tests": _tests,
    "composed": _composed,
    "alike": _alike,
    "other_start": _other_start,
    "controls": _controls,
}
