"""What an adapter makes of a checkpoint's tensors: which of them become others, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightlab.adapters.changes import Change, Folded, Product, Values, same_change
from weightlab.adapters.config import ExpertsLayout
from weightlab.adapters.reading import Adapter, fp32
from weightlab.errors import NamesMismatchError, UsageError
from weightlab.extract._adapter_places import Place, Places
from weightlab.extract._added import ENCODING, stored_bits
from weightlab.patches.fit import names_of
from weightlab.patches.layout import StoredTensor
from weightlab.sources import Source
from weightlab.tensors.codes import codes_met, refusal
from weightlab.tensors.naming import Renames, infer, resolve
from weightlab.tensors.naming import options as options_of
from weightlab.tensors.naming import remedy as tell_renaming
from weightlab.tensors.order import natural_key
from weightlab.tensors.select import matches, rename, select
from weightlab.tensors.spec import TensorSpec

_UNTIED = (
    "the adapter takes tied tensors apart: merge it with peft (merge_and_unload, save_pretrained), which writes both, "
    "then take a diff with --allow added"
)


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """How adapters are read, and which of their tensors are wanted.

    Attributes:
        include, exclude: globs over the model's tensor names; what is left out is neither needed nor checked.
        renames: {old: new} from the adapter's names to the model's, see `rename`; "auto" infers it.
        allow_added: whether tensors that the model lacks are added to it.
        experts_layout: how stacked experts lie in `lora_B`, whatever the configuration says.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    renames: Renames = field(default_factory=dict)
    allow_added: bool = False
    experts_layout: ExpertsLayout | None = None


@dataclass(slots=True)
class Share:
    """What one of the network's tensors has of a tensor of the files.

    Attributes:
        name: the network's.
        shape: the network's tensor's; None: that of the files' tensor.
        view: which part of it the files' tensor is; None: all.
    """

    name: str
    changes: list[Change]
    shape: tuple[int, ...] | None = None
    view: Tensor | None = None


@dataclass(slots=True)
class Target:
    """A tensor of the files, as it is (None: it is not there) and as it becomes."""

    before: TensorSpec | None
    after: TensorSpec
    shares: list[Share] = field(default_factory=list)

    @property
    def product(self) -> Product | None:
        """The factors that are all of its change, and take less room than it."""
        changes = [change for share in self.shares for change in share.changes]
        if len(changes) != 1 or not isinstance(changes[0], Product) or self.shares[0].view is not None:
            return None
        factors = changes[0].left.numel() + changes[0].right.numel()
        return changes[0] if factors < self.after.numel else None

    @property
    def values(self) -> Tensor:
        """What a tensor that is added is."""
        (values,) = [c.values for share in self.shares for c in share.changes if isinstance(c, Values)]
        return values

    @property
    def encoding(self) -> str:
        """How its change is stored; a tensor that is added has no difference, so its bits are."""
        if self.before is None:
            return ENCODING
        return "dense" if self.product is None else "low_rank"

    def stored(self) -> StoredTensor:
        """What is stored of it."""
        if self.before is None:
            return stored_bits(self.after)
        if self.product is None:
            return StoredTensor({"delta": TensorSpec("delta", "F32", self.after.shape)})
        factors = {"left": self.product.left, "right": self.product.right}
        return StoredTensor({part: TensorSpec(part, "F32", tuple(tensor.shape)) for part, tensor in factors.items()})


def targets_alone(adapter: Adapter) -> dict[str, Target]:
    """Targets under the adapter's own names.

    Raises:
        UsageError: lists tensors of which only a model tells what they become.
    """
    lacking = [n for n, changes in adapter.changes.items() if not all(isinstance(c, Product) for c in changes)]
    if lacking:
        raise UsageError(
            f"{adapter.label}: what these become depends on the model", "name the model, with --base", lacking
        )
    targets = {}
    for name, changes in adapter.changes.items():
        (product, *_) = [c for c in changes if isinstance(c, Product)]
        spec = TensorSpec(name, "F32", (product.left.shape[0], product.right.shape[1]))
        targets[name] = Target(spec, spec, [Share(name, changes)])
    return targets


def targets_on(adapter: Adapter, base: Source, places: Places, options: AdapterOptions) -> dict[str, Target]:
    """Targets in a checkpoint's files.

    Raises:
        NamesMismatchError: lists the tensors that the base lacks, or has in another shape.
        MisfitError: lists tensors that are codes of a quantised checkpoint.
        UsageError: a pattern matches nothing.
    """
    return _Fitting(adapter, base, places, options).targets()


class _Fitting:
    def __init__(self, adapter: Adapter, base: Source, places: Places, options: AdapterOptions) -> None:
        self._adapter, self._base, self._places, self._options = adapter, base, places, options
        self._there = {name: places.of(name) for name in adapter.changes}
        self._found: dict[str, Target] = {}
        self._missing: list[str] = []
        self._lacking: list[str] = []
        self._codes: list[str] = []
        self._wrong: list[str] = []
        self._untied: list[str] = []

    def targets(self) -> dict[str, Target]:
        wanted = self._wanted()
        ends: dict[str, list[str]] = {}
        for name, there in self._there.items():
            if there and there[0].view is None:
                ends.setdefault(there[0].stored, []).append(name)
        in_codes = codes_met(self._base, self._adapter.changes)
        for name, every in self._adapter.changes.items():
            there = [place for place in self._there[name] if place.stored in wanted]
            if not self._there[name] and name in in_codes and name in wanted:
                self._codes.append(name)
            elif not self._there[name] and name in wanted:
                self._add_new(name, every)
            elif there and not self._follows(name, ends.get(there[0].stored, [])):
                for place in there:
                    self._put(name, every, place, len(ends.get(place.stored, [])))
        self._raise_any()
        return {name: self._found[name] for name in sorted(self._found, key=natural_key)}

    def _wanted(self) -> set[str]:
        """The names of the model's tensors, or of those that it lacks, that the filters leave."""
        names = list(dict.fromkeys(p.stored for there in self._there.values() for p in there))
        names += [name for name, there in self._there.items() if not there]
        exclude = [e for e in self._options.exclude if any(matches(n, [e]) for n in names) or not self._is_beside(e)]
        return set(select(names, self._options.include, exclude))

    def _is_beside(self, pattern: str) -> bool:
        """Whether a pattern leaves out what the model has and the adapter does not change."""
        return any(matches(name, [pattern]) for name in (*self._base.specs, *self._base.aliases))

    def _follows(self, name: str, ends: list[str]) -> bool:
        """Whether another end of a tie has the same change already; one tensor cannot become two."""
        if not ends or name == ends[0]:
            return False
        first, mine = self._adapter.changes[ends[0]], self._adapter.changes[name]
        spec = self._base.specs[self._there[name][0].stored]
        kept = [[c for c in changes if not _is_there(c, self._base, spec)] for changes in (first, mine)]
        if len(kept[0]) == len(kept[1]) and all(map(same_change, *kept)):
            return True
        self._untied.append(f"{ends[0]} and {name}: changed differently, and the model has both as {spec.name}")
        return True

    def _add_new(self, name: str, changes: list[Change]) -> None:
        (first, *more) = changes
        if isinstance(first, Values) and not bool(torch.isfinite(first.values).all()):
            self._wrong.append(f"{name}: NaN or infinity")
        if isinstance(first, Folded) and first.optional:
            return  # a layer without bias
        if isinstance(first, Values) and not more and self._options.allow_added:
            spec = TensorSpec(name, first.dtype, tuple(first.values.shape))
            self._found[name] = Target(None, spec, [Share(name, changes)])
        elif isinstance(first, Values) and not more:
            self._lacking.append(f"{name} {list(first.values.shape)}: not in the model")
        else:
            self._missing.append(f"{name}: not in the model")

    def _put(self, name: str, every: list[Change], place: Place, ends: int) -> None:
        spec = self._base.specs[place.stored]
        if place.stored in self._base.opaque or not spec.is_float:
            self._codes.append(place.stored)
            return
        changes = [c for c in every if place.view is not None or not _is_there(c, self._base, spec)]
        shape = place.shape or spec.shape
        for change in changes:
            problem = change.problem(shape)
            if place.view is not None and isinstance(change, Values) and tuple(change.values.shape) != shape:
                problem = f"its values are {list(change.values.shape)}, and the files have {name} in parts"
            self._wrong += [f"{place.stored} {list(spec.shape)}: {problem}"] if problem else []
            if isinstance(change, Values) and not problem:  # what its factors are added to may have more rows
                shape = tuple(change.values.shape)
        if ends == 1 and any(isinstance(change, Values) for change in changes):
            self._refuse_one_end(name, place)
        if changes:
            target = self._found.setdefault(place.stored, Target(spec, spec))
            target.shares.append(Share(name, changes, place.shape, place.view))
            rows = max((c.values.shape[0] for c in changes if isinstance(c, Values) and c.values.ndim), default=0)
            if place.view is None and rows > (target.after.shape or (0,))[0]:
                target.after = TensorSpec(place.stored, spec.dtype, (rows, *spec.shape[1:]))

    def _refuse_one_end(self, name: str, place: Place) -> None:
        """New values of one end of a tie only.

        What `modules_to_save` names is a copy in training, whose other end stays as it was; what peft saves otherwise
        it saves while both are one.
        """
        module, _, own = name.rpartition(".")
        apart = self._adapter.config.is_apart(module)
        others = [other for other in self._places.ends(place.stored) if other != name]
        if place.tied and (apart or own == "weight"):
            self._untied.append(f"{name}: new values, and the model has it as {place.stored} only, to which it is tied")
        elif apart and others:
            self._untied.append(f"{name}: new values, and the model has {', '.join(others)} in the same tensor")

    def _raise_any(self) -> None:
        adapter, base = self._adapter, self._base
        if self._codes:
            raise refusal(base, names=self._codes)
        if self._missing or self._wrong or self._untied:
            raise NamesMismatchError(
                f"{adapter.label} does not fit {base.label}",
                _UNTIED if self._untied else self._renaming() or "give the model that it was trained on",
                [*self._lacking, *self._missing, *self._wrong, *self._untied],
            )
        if self._lacking:
            raise NamesMismatchError(
                f"{adapter.label} has tensors of its own that {base.label} lacks, such as a head",
                "add them with --allow added, or leave them out with --exclude; else give the model that it was "
                "trained on",
                self._lacking,
            )

    def _renaming(self) -> str:
        """The option that gives names a place, where that is all that is wrong; empty where there is none."""
        nowhere = [name for name, there in self._there.items() if not there]
        if self._wrong or not nowhere:
            return ""
        given, wanted = ({n: TensorSpec(n, "F32", ()) for n in names} for names in (nowhere, names_of(self._base)))
        found = infer(given, wanted)
        return tell_renaming(found) if found and found[0].paired == len(nowhere) else ""


def _is_there(change: Change, base: Source, spec: TensorSpec) -> bool:
    """Whether these are values that the base has already: peft saves embeddings whole beside what it trained."""
    return (
        isinstance(change, Values)
        and tuple(change.values.shape) == spec.shape
        and torch.equal(fp32(base, spec.name), change.values)
    )


def renamed(adapter: Adapter, renames: Renames, base: Source | None) -> None:
    """Puts the changes under the names that `--map` makes of them.

    Raises:
        NamesMismatchError, UsageError: see `resolve` and `rename`; "auto" goes by names alone, as a network may have a
            tensor in another shape than its files.
    """
    if renames == "auto":
        if base is None:
            raise UsageError("--map auto needs the model's names", "name the model, or pass --map OLD=NEW")
        given, wanted = ({n: TensorSpec(n, "F32", ()) for n in names} for names in (adapter.changes, names_of(base)))
        renames = resolve(given, wanted, "auto") if given.keys() - wanted.keys() else {}
        adapter.notes += [f"names were mapped: {options_of(renames)}"] if renames else []
    if renames:
        names = rename(adapter.changes, renames)
        adapter.changes = {names[name]: changes for name, changes in adapter.changes.items()}


def other_base(adapter: Adapter, base: Source) -> str:
    """A line that says that the adapter was trained on a model of another name; empty where the names agree."""
    trained_on, path = adapter.config.trained_on, base.path
    if trained_on is None or path is None:
        return ""
    config: Mapping[str, Any] = getattr(base, "config", {})
    folder = path if path.is_dir() else path.parent
    names = [str(name) for name in (config.get("_name_or_path"), folder.resolve().name, path.name) if name]
    if _last(trained_on) in map(_last, names):
        return ""
    shown = trained_on if adapter.config.base_name else Path(trained_on).name
    shown = "".join(letter for letter in shown[:200] if letter.isprintable())
    return f"was trained on {shown}, and this model goes by another name"


def _last(name: str) -> str:
    return Path(name.rstrip("/")).name.removesuffix(".safetensors").lower()


def additions(targets: Mapping[str, Target]) -> str:
    """A line that names the tensors that are new to the model; empty where there are none."""
    names = [name for name, target in targets.items() if target.before is None]
    if not names:
        return ""
    return f"new to the model: {', '.join(names)}; its config.json still names a class that may not have them"
