"""Doing a fine-tune again for every base release, each time from what the last one learned (arXiv 2503.20110).

    iterative   M1* = FT(M1);  Mi* = FT(Mi + λ·(M*(i−1) − M(i−1)))
    direct      Mi* = FT(Mi + λ·(FT(M(i−1)) − M(i−1))): every release is also tuned plainly, and nothing adds up

The fine-tuning is the user's own command. Between steps only differences are kept.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from weightlab.errors import InputError, NotPatchableError, UsageError
from weightlab.files import disk
from weightlab.files.atomic import atomic_file
from weightlab.files.digest import bytes_digest
from weightlab.files.foreign import plain_names, read_json, read_yaml
from weightlab.files.temporary import clear_left
from weightlab.ops.diff import diff
from weightlab.ops.operands import model_path
from weightlab.ops.transfer import transfer
from weightlab.stream.executor import Resources

_START, _OUT = "{start}", "{out}"
_STATE = "plan.json"
Say = Callable[[str], None]


class Plan(BaseModel):
    """What a plan file says. Paths are relative to the file.

    Attributes:
        bases: the releases, oldest first; two or more.
        train: a command line with `{start}` and `{out}`: it tunes the model in one folder and saves it to the other.
        work: the folder beside the plan in which differences and the state are kept.
        result: the folder beside the plan that the last tuned model becomes.
        scale: λ.
        encode: how the differences are stored.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    bases: list[str] = Field(min_length=2)
    train: str
    work: str
    result: str
    algorithm: Literal["iterative", "direct"] = "iterative"
    scale: float = 1.0
    encode: str = "exact"


class _Known(BaseModel):
    """What the state in `work` says: which plan it belongs to, and its steps."""

    model_config = ConfigDict(strict=True, frozen=True)

    plan: str
    steps: list[Any] = []


@dataclass(frozen=True, slots=True)
class Step:
    """One run of the user's command.

    Attributes:
        name: of its folder in `work`.
        base: the release that it tunes, from 0.
        after: the step whose difference it starts with; None: it starts with the release itself.
    """

    name: str
    base: int
    after: str | None


@dataclass(slots=True)
class Recycled:
    """What was done: the steps run, those that had been done before, and where the last tuned model is."""

    result: str
    ran: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    dry_run: bool = False


def steps_of(plan: Plan) -> list[Step]:
    """The runs of the user's command, in order; the last one makes the result."""
    count = len(plan.bases)
    if plan.algorithm == "iterative":
        names = [f"{n + 1}-tuned" for n in range(count)]
        return [Step(name, n, names[n - 1] if n else None) for n, name in enumerate(names)]
    plain = [Step(f"{n + 1}-plain", n, None) for n in range(count - 1)]
    recycled = [Step(f"{n + 1}-tuned", n, f"{n}-plain") for n in range(1, count)]
    return sorted([*plain, *recycled], key=lambda step: (step.base, step.after is not None))


def read_plan(path: Path) -> Plan:
    """Reads a plan and checks that its bases are there.

    Raises:
        MissingInputError, MalformedFileError: it is no plan; all that is wrong is listed.
        UsageError: the command lacks a placeholder, or no shell could read it; one folder for two purposes.
    """
    plan: Plan = read_yaml(path, Plan)
    plain_names([plan.work, plan.result], f"{path}: work and result")
    if plan.work == plan.result:
        raise UsageError(f"{path}: work and result are one folder, {plan.work!r}", "give each its own")
    words(plan)
    lacking = [place for place in (_START, _OUT) if place not in plan.train]
    if lacking:
        raise UsageError(f"{path}: the command has no place for {' and '.join(lacking)}", f"train: {plan.train}")
    for base in plan.bases:
        model_path(path.parent / base)
    return plan


def words(plan: Plan) -> list[str]:
    """The user's command in words.

    Raises:
        UsageError: a quote is not closed, or no command can have such a word.
    """
    try:
        found = shlex.split(plan.train)
    except ValueError as error:
        raise UsageError(f"train: {plan.train!r}: {error}", "write it as for a shell") from error
    if not found or "\0" in plan.train:
        raise UsageError(f"train: {plan.train!r}: no command", "write it as for a shell")
    return found


def recycle(
    path: str | Path, *, dry_run: bool = False, say: Say = lambda text: None, resources: Resources | None = None
) -> Recycled:
    """Runs a plan, or goes on with it where it stopped.

    Args:
        say: told what comes next.

    Raises:
        InputError, UsageError: the plan, or a command that failed.
        NotPatchableError: the result is there already, or `work` belongs to another plan.
    """
    file = Path(path)
    return _Run(file.absolute(), read_plan(file), say, resources).run(dry_run)


class _Run:
    def __init__(self, file: Path, plan: Plan, say: Say, resources: Resources | None) -> None:
        self._home, self._plan, self._say, self._resources = file.parent, plan, say, resources
        work, result = plain_names([plan.work, plan.result], f"{file}: work and result")
        self._work, self._result = self._home / work, self._home / result
        self._steps = steps_of(plan)
        # What decides the outcome; the name of the result does not.
        decisive = plan.model_dump(exclude={"result", "work"})
        self._require_no_links()
        self._id = bytes_digest(json.dumps(decisive, sort_keys=True).encode())[:16]

    def run(self, dry_run: bool) -> Recycled:
        self._check_place(dry_run)
        done = Recycled(str(self._result), dry_run=dry_run)
        for step in self._steps:
            last = step is self._steps[-1]
            if not last and self._patch(step.name).exists():
                done.found.append(step.name)
                if not dry_run:
                    self._tidy(step)
                continue
            done.ran.append(step.name)
            if not dry_run:
                self._step(step, last=last)
        return done

    def _check_place(self, dry_run: bool) -> None:
        state, last = self._work / _STATE, self._steps[-1]
        ours = state.exists() and read_json(state, _Known).plan == self._id
        if self._result.exists():
            if ours and not dry_run and not (self._work / last.name / "out").exists():
                self._tidy(last)  # what a run left that was cut off just after its result had got its name
            raise NotPatchableError(f"{self._result} exists already", "the plan has been carried out, or name another")
        if state.exists() and not ours:
            raise NotPatchableError(
                f"{self._work}: belongs to another plan, or this one was changed", "give `work` another folder"
            )

    def _require_no_links(self) -> None:
        folders = [self._work, *(self._work / step.name for step in self._steps)]
        inside = [folder / name for folder in folders for name in (_STATE, "out", "start", "change.safetensors")]
        links = [str(place) for place in (*folders, *inside, self._result) if place.is_symlink()]
        if links:
            raise NotPatchableError(f"{self._work}: links, which would lead elsewhere", "remove them", links)

    def _step(self, step: Step, *, last: bool) -> None:
        self._begin()
        start, out = self._start(step), self._work / step.name / "out"
        if out.exists():
            disk.remove_tree(out)  # of a run that was cut off
        self._say(f"{step.name}: {self._words(start, out)}")
        self._train(start, out)
        for after in (s for s in self._steps if s.after == step.name):
            self._move(step, out, after)
        if last:
            disk.rename(out, self._result)
        else:
            base = self._base(step.base)
            diff(
                base,
                out,
                self._patch(step.name),
                encode=self._plan.encode,
                allow=("added", "rows"),
                resources=self._resources,
            )
        self._tidy(step)

    def _tidy(self, step: Step) -> None:
        """Removes what only a step itself needed, if it is there."""
        for folder in (self._work / step.name / "out", self._work / step.name / "start"):
            clear_left(folder)
            if folder.exists():
                disk.remove_tree(folder)
        clear_left(self._patch(step.name))

    def _begin(self) -> None:
        _folder(self._work)
        state = self._work / _STATE
        clear_left(state)
        if not state.exists():
            content = json.dumps({"plan": self._id, "steps": [step.name for step in self._steps]})
            with atomic_file(state) as temporary:
                fd = disk.create(temporary)
                disk.write_at(fd, content.encode(), 0, temporary)
                os.close(fd)

    def _start(self, step: Step) -> Path:
        """The folder that the user's command starts with."""
        return self._base(step.base) if step.after is None else self._work / step.name / "start"

    def _move(self, step: Step, tuned: Path, after: Step) -> None:
        """Makes the start of a later step while the tuned model is still there, whose chat template comes along."""
        start = self._start(after)
        _folder(start.parent)
        if start.exists():
            disk.remove_tree(start)
        self._say(f"{after.name}: starts with {self._plan.bases[after.base]} + {self._plan.scale:g} × {step.name}")
        base, target = self._base(step.base), self._base(after.base)
        transfer(base, tuned, target, start, scale=self._plan.scale, resources=self._resources)

    def _train(self, start: Path, out: Path) -> None:
        _folder(out.parent)
        command = self._words(start, out)
        try:
            ended = subprocess.run(command, cwd=self._home, check=False)
        except (OSError, ValueError) as error:  # ValueError: half characters, which no command can have
            raise UsageError(f"{command[0]}: cannot be run: {error}", "check `train` in the plan") from error
        if ended.returncode:
            raise InputError(
                f"the command ended with {ended.returncode}: {shlex.join(command)}",
                "mend it, and run the plan again: it goes on from here",
            )
        model_path(out)

    def _words(self, start: Path, out: Path) -> list[str]:
        return [w.replace(_START, str(start)).replace(_OUT, str(out)) for w in words(self._plan)]

    def _base(self, index: int) -> Path:
        return self._home / self._plan.bases[index]

    def _patch(self, name: str) -> Path:
        return self._work / name / "change.safetensors"


def _folder(path: Path) -> None:
    """Makes a folder, and those above it."""
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            disk.make_folder(folder)
