"""The modules of a model by the names that programs for images give them: dots as underscores, parts as prefixes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from weightlab.adapters.forms._blocks import other_names
from weightlab.errors import MisfitError
from weightlab.sources import Source

# Where the parts of a pipeline lie in one file that has them all.
_IN_ONE_FILE = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
_TEXT = "text_model_"
NETWORKS = ("unet", "transformer", "prior", "")
"""The parts of a pipeline that may be its network; "" is a model of one part."""


@dataclass(slots=True)
class _Module:
    """Attributes:
    weight, bias: the model's names of its tensors; empty where it has none.
    """

    weight: str = ""
    bias: str = ""


@dataclass(slots=True)
class _Part:
    """One part of a pipeline: {name with underscores: {the module's own name: the module}}."""

    named: dict[str, dict[str, _Module]] = field(default_factory=dict)


class Modules:
    """Finds the model's modules by an adapter's names for them.

    Args:
        base: the model; None: every module is called what the adapter calls it.
    """

    def __init__(self, base: Source | None) -> None:
        self._known = base is not None
        self._parts: dict[str, _Part] = {}
        self._taken: dict[str, str] = {}
        self._ambiguous: list[str] = []
        self._twice: list[str] = []
        owners: dict[str, dict[str, _Module]] = {}
        for name in () if base is None else (*base.specs, *base.aliases):
            part, inner = _part_of(name)
            for owner, own in _owners(inner):
                module = owners.setdefault(part, {}).setdefault(owner, _Module())
                setattr(module, own, name)
        for part, modules in owners.items():
            found = self._parts.setdefault(part, _Part()).named
            for owner, module in modules.items():
                found.setdefault(_flat(owner), {})[owner] = module
            if part in NETWORKS:
                for other, owner in other_names(modules).items():
                    if other not in modules:
                        found.setdefault(_flat(other), {})[owner] = modules[owner]

    def find(self, parts: Sequence[str], module: str, called: str) -> _Module:
        """The module of that name in one of these parts of the model, the first that there is.

        Args:
            module: its name, with dots or underscores.
            called: what the adapter calls it as a whole; what it is called where the model has no such module.
        """
        there = [self._parts[part].named for part in parts if part in self._parts]
        found = next((named[name] for named in there for name in _called(module) if name in named), {})
        if len({tensor.weight or tensor.bias for tensor in found.values()}) > 1:
            self._ambiguous.append(f"{called}: {' or '.join(sorted(found))}")
        if not found:
            return _Module(f"{called}.weight", f"{called}.bias")
        (chosen, *_) = found.values()
        first = self._taken.setdefault(chosen.weight or chosen.bias, called)
        if first != called:
            self._twice.append(f"{chosen.weight or chosen.bias}: {first} and {called}")
        return _Module(chosen.weight or f"{called}.weight", chosen.bias or f"{called}.bias")

    def raise_any(self, label: str) -> None:
        """Raises:
        MisfitError: lists names that more than one module could have, or tensors that two modules would change.
        """
        if self._ambiguous or self._twice:
            raise MisfitError(
                f"{label}: which of the model's tensors it changes is not clear",
                "give the folder of the whole pipeline, or the part of the model that it is for",
                [*self._ambiguous, *self._twice],
            )


def _part_of(name: str) -> tuple[str, str]:
    if "/" in name:
        part, _, inner = name.partition("/")
        return part, inner
    for prefix, part in _IN_ONE_FILE.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return "", name


def _owners(inner: str) -> Iterable[tuple[str, str]]:
    """(module, which of its two tensors) of a tensor's name; `nn.MultiheadAttention` has one for three projections."""
    owner, dot, own = inner.rpartition(".")
    if own in ("weight", "bias") and dot:
        yield owner, own
    elif own in ("in_proj_weight", "in_proj_bias") and dot:
        for called in (owner, f"{owner}.in_proj"):
            yield called, own.removeprefix("in_proj_")


def _called(module: str) -> tuple[str, str]:
    """A module's names with underscores: text encoders have been saved with and without `text_model`."""
    name = _flat(module)
    return name, name.removeprefix(_TEXT) if name.startswith(_TEXT) else _TEXT + name


def _flat(name: str) -> str:
    return name.replace(".", "_")
