"""LoRA's factors as changes: which way a weight lies, DoRA, embeddings, convolutions, parameters that are targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from weightlab.adapters.changes import Addition, Change, Dora, Product, Stacked
from weightlab.adapters.config import AdapterConfig, ExpertsLayout
from weightlab.adapters.keys import INNER
from weightlab.adapters.orientation import Matrix, Shapes, submodule, turned
from weightlab.errors import MalformedFileError, UnsupportedFormatError, UsageError

FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?"
)


@dataclass(slots=True)
class LoraModules:
    """All modules of an adapter, computed together: some say which way others lie.

    Attributes:
        network: asks for the network, which is made once; it may be None.
        layout: how stacked experts are packed, where the user says it.
        modules: {module, with a `.base_layer` for each wrapper inside another: {part: tensor}}.
    """

    label: str
    config: AdapterConfig
    network: Callable[[], Any]
    shapes: Shapes
    layout: ExpertsLayout | None
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _turned: dict[str, bool] = field(default_factory=dict)

    def changes(self) -> dict[str, list[Change]]:
        """{the network's name of a tensor: its changes}.

        Raises:
            MalformedFileError: lists factors that are missing or are no matrices that can be multiplied.
            UnsupportedFormatError: lists convolutions in groups, whose weight has no place for what LoRA adds.
            UsageError: which way matrices lie, what a factor is for, or how experts are packed cannot be told.
        """
        grouped = [owner_of(module) for module, parts in self.modules.items() if _grouped(parts)]
        if grouped:
            raise UnsupportedFormatError(
                f"{self.label}: LoRA on convolutions in groups does not fold into their weights: it joins the groups",
                "use it with peft, on the model; or leave it out when you train",
                grouped,
            )
        problems = {m: _problem(parts) or self._other_rank(m, parts) for m, parts in self.modules.items()}
        wrong = [f"{module}: {problem}" for module, problem in problems.items() if problem]
        wrong += [f"{m}: more parameters than target_parameters names" for m in self.modules if self._too_deep(m)]
        wrong += [
            f"{module}: {' and '.join(sorted(parts.keys() - {'lora_A.weight', 'lora_B.weight'}))} on a parameter"
            for module, parts in self.modules.items()
            if len(parts) > 2 and self.config.parameters_of(owner_of(module))
        ]
        if wrong:
            raise MalformedFileError(f"{self.label}: its factors make no sense", "get the adapter again", wrong)
        self._orient()
        found: dict[str, list[Change]] = {}
        for module, parts in self.modules.items():
            for name, change in self._of(module, parts):
                found.setdefault(name, []).append(change)
        return found

    def _other_rank(self, module: str, parts: Mapping[str, Tensor]) -> str:
        """Why a module's rank is not the configuration's, by which alpha is divided; peft does not load such a file."""
        owner = owner_of(module)
        down = parts.get("lora_A.weight", parts.get("lora_embedding_A"))
        expected = self.config.rank_of(owner)
        if down is None or not down.ndim or expected is None or self.config.parameters_of(owner):
            return ""
        rank = down.shape[0]
        return "" if rank == expected else f"rank {rank} in the file, {expected} in adapter_config.json"

    def _of(self, module: str, parts: Mapping[str, Tensor]) -> list[tuple[str, Change]]:
        owner = owner_of(module)
        if "lora_embedding_A" in parts:
            down, up = parts["lora_embedding_A"], parts["lora_embedding_B"]
            product = Product(down.T.contiguous(), (up * self.config.scaling(owner, down.shape[0])).T.contiguous())
            return [(f"{owner}.weight", _with_magnitude(product, parts, transposed=True))]
        down, up = parts["lora_A.weight"], parts["lora_B.weight"]
        targets = self.config.parameters_of(owner)
        if targets:
            return [self._parameter(module, owner, targets, down, up)]
        scaling = self.config.scaling(owner, down.shape[0])
        if module.endswith(f"{INNER}.out_proj"):  # of nn.MultiheadAttention: peft adds it twice, in training too
            scaling *= 2
        left, right = up.flatten(1) * scaling, down.flatten(1)
        lies = self._turned.get(module, False)
        product = Product(right.T.contiguous(), left.T.contiguous()) if lies else Product(left, right)
        found: list[tuple[str, Change]] = [(self._weight(owner), _with_magnitude(product, parts, transposed=lies))]
        if "lora_B.bias" in parts:
            found.append((f"{owner}.bias", Addition(parts["lora_B.bias"] * scaling)))
        return found

    def _weight(self, owner: str) -> str:
        """The tensor that a module's factors are for: `nn.MultiheadAttention` has its three projections in one."""
        packed = f"{owner}.in_proj_weight"
        return (
            packed if self.shapes(f"{owner}.weight") is None and self.shapes(packed) is not None else f"{owner}.weight"
        )

    def _orient(self) -> None:
        matrices: dict[str, Matrix] = {}
        for module, parts in self.modules.items():
            owner = owner_of(module)
            if not _embeds(parts) and parts["lora_A.weight"].ndim == 2 and not self.config.parameters_of(owner):
                outputs, inputs = parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]
                matrices[module] = Matrix(owner, self._weight(owner), outputs, inputs)
        self._turned = turned(self.label, self.config, matrices, self.shapes, self.network)

    def _too_deep(self, module: str) -> bool:
        targets = self.config.parameters_of(owner_of(module))
        return bool(targets) and module.removeprefix(owner_of(module)).count(INNER) >= len(targets)

    def _parameter(self, module: str, owner: str, targets: list[str], down: Tensor, up: Tensor) -> tuple[str, Change]:
        """peft wraps a module once for each of its parameters that is a target: the innermost is the module's first."""
        inner = submodule(self.network(), owner)
        if inner is not None:
            targets = [name for name, _ in inner.named_parameters(recurse=False) if name in targets] or targets
        elif len(targets) > 1:
            raise UsageError(
                f"{self.label}: which of {', '.join(targets)} a factor is for depends on the network",
                "put it on a folder with the model's config.json",
            )
        depth = module.removeprefix(owner).count(INNER)
        if depth >= len(targets):
            raise MalformedFileError(
                f"{self.label}: {module} has more factors than the network has parameters for", "give its own model"
            )
        name = targets[len(targets) - 1 - depth]
        in_first = None if inner is None else bool(getattr(inner, "is_transposed", False))
        whole = f"{owner}.{name}"
        by_expert = self._packing(whole, name) == "unsloth"
        return whole, Stacked(down, up, partial(self.config.scaling, whole), in_first, by_expert)

    def _packing(self, whole: str, name: str) -> ExpertsLayout:
        shape = self.shapes(whole)
        if shape is not None and len(shape) != 3:
            return "peft"
        told = self.layout or self.config.experts_layouts.get(name) or self.config.experts_layout
        if told is None and self.config.by_unsloth:
            raise UsageError(
                f"{self.label}: Unsloth made it, and it does not say how the experts lie in lora_B",
                "put it on with `weightlab apply --experts-layout unsloth` if Unsloth's own kernels trained it (and it "
                "wrote no lora_B_layout yet), with --experts-layout peft if peft merges it rightly",
                [whole],
            )
        return told or "peft"


def owner_of(module: str) -> str:
    """A module's own name, without those of the wrappers that it has been put in."""
    return ".".join(part for part in module.split(".") if part != INNER[1:])


def _problem(parts: Mapping[str, Tensor]) -> str:
    """What is wrong with the factors of one module; empty when nothing is."""
    names = ("lora_embedding_A", "lora_embedding_B") if _embeds(parts) else ("lora_A.weight", "lora_B.weight")
    missing = [name for name in names if name not in parts]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    down, up = (parts[name] for name in names)
    shapes = f"{names[0]} is {list(down.shape)}, {names[1]} is {list(up.shape)}"
    known = {*names, "lora_magnitude_vector", *([] if _embeds(parts) else ["lora_B.bias"])}
    if parts.keys() - known:
        return f"{' and '.join(sorted(parts.keys() - known))} beside {names[0]}"
    if down.ndim < 2 or up.ndim < 2 or not down.numel() or not up.numel():
        return shapes
    if up.numel() != up.shape[0] * up.shape[1] or (_embeds(parts) and down.ndim != 2):
        return shapes
    return "" if down.shape[0] == up.shape[1] else f"the ranks differ: {shapes}"


def _grouped(parts: Mapping[str, Tensor]) -> bool:
    """Whether B has the ranks of one group only: peft's A joins all inputs, and its B works group by group."""
    down, up = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if down is None or up is None or min(down.ndim, up.ndim) < 3 or not up.shape[1]:
        return False
    return down.shape[0] > up.shape[1] and down.shape[0] % up.shape[1] == 0


def _embeds(parts: Mapping[str, Tensor]) -> bool:
    return "lora_embedding_A" in parts or "lora_embedding_B" in parts


def _with_magnitude(product: Product, parts: Mapping[str, Tensor], *, transposed: bool) -> Change:
    magnitude = parts.get("lora_magnitude_vector")
    return product if magnitude is None else Dora(product, magnitude, transposed)
