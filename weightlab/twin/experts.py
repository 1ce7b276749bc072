"""Experts as they are given: checkpoints, patches, PEFT adapters; and which of their tensors all of them have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from weightlab.errors import NamesMismatchError, UsageError
from weightlab.files.foreign import is_plain_name
from weightlab.ops.alike import clean_source, require_same
from weightlab.ops.new_checkpoint import checked_fit
from weightlab.ops.operands import PathLike, base_of, model_path, names_patch, open_patches, parse_patch
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.patches.patch import Patch
from weightlab.patches.patched_source import DeltaSource, PatchedSource
from weightlab.patches.ties import Copies
from weightlab.sources import Source
from weightlab.sources.virtual.chosen import ChosenSource
from weightlab.sources.virtual.computed import ComputedSource, read_values
from weightlab.sources.virtual.joined import JoinedSource
from weightlab.stream.executor import Resources
from weightlab.tensors.codes import refusal, require_same_form
from weightlab.tensors.order import natural_key
from weightlab.tensors.spec import TensorSpec
from weightlab.tensors.workspace import WorkspaceOfThread
from weightlab.twin.folder import no_expert_names


def named(experts: Mapping[str, PathLike] | Sequence[PathLike]) -> dict[str, PathLike]:
    """Experts by name; of a list of `[NAME=]PATH` the last part of each path, without its ending, where it has none.

    Raises:
        UsageError: nothing, a name twice, or one that is no name of a folder.
    """
    pairs = list(experts.items()) if isinstance(experts, Mapping) else [_with_name(os.fspath(path)) for path in experts]
    if len(pairs) < 2:
        raise UsageError("a twin has two experts or more", "give their paths")
    found: dict[str, list[PathLike]] = {}
    for name, path in pairs:
        found.setdefault(name, []).append(path)
    twice = [f"{name}: {', '.join(map(str, paths))}" for name, paths in found.items() if len(paths) > 1]
    if twice:
        raise UsageError("two experts have the same name", "name them: NAME=PATH", twice)
    wrong = [repr(name) for name in found if name in no_expert_names([name]) or not is_plain_name(name)]
    if wrong:
        raise UsageError("these are no names for experts", "name them: NAME=PATH", wrong)
    return {name: paths[0] for name, paths in found.items()}


def _with_name(text: str) -> tuple[str, str]:
    """The name and the path in `[NAME=]PATH`; a path that exists wins as a whole."""
    name, sign, path = text.partition("=")
    if sign and not Path(parse_patch(text)[0]).exists():
        return name, path
    return Path(parse_patch(text)[0]).resolve().name.removesuffix(".safetensors"), text


def expert_source(
    stack: ExitStack, base: PathLike, start: Source, expert: PathLike, wait: float, resources: Resources
) -> Source:
    """An expert's tensors. Of a patch or an adapter: the base with it on, not rounded where the base has fewer bits.

    Args:
        start: the opened base.
    """
    if not names_patch(expert):
        return clean_source(stack, model_path(expert), wait, resources)
    (patch,) = open_patches(expert, base_of(base, wait=wait, resources=resources))
    fitted = PatchedSource(start, checked_fit(start, [StackEntry(patch, patch.exact_scale)], resources))
    plain = [n for n, record in patch.records.items() if _is_sum(patch, n, start)]
    rest = ChosenSource(fitted, [n for n in fitted.specs if n not in plain])
    return JoinedSource([_sum(start, patch, plain), rest], patch.label)


def _is_sum(patch: Patch, name: str, start: Source) -> bool:
    """Whether a patch adds a difference to a tensor that keeps its shape."""
    record = patch.records[name]
    if name not in start.specs or record.encoding == "removed" or patch.encoding(name).lossless:
        return False
    return tuple(record.shape) == start.specs[name].shape


def _sum(start: Source, patch: Patch, names: Sequence[str]) -> Source:
    delta, own = DeltaSource([patch], None, names), WorkspaceOfThread()

    def compute(name: str, first: int, last: int) -> Tensor:
        dtype = delta.specs[name].type.torch
        assert dtype is not None
        total = own.workspace.buffer("expert", last - first, dtype)
        delta.read(name, first * total.element_size(), total.view(torch.uint8))
        raw = own.workspace.buffer("start", (last - first) * start.specs[name].type.itemsize, torch.uint8)
        return total.add_(read_values(start, name, first, last, raw))

    specs = {n: TensorSpec(n, delta.specs[n].dtype, start.specs[n].shape) for n in names}
    return ComputedSource(patch.label, specs, compute)


def shared_tensors(
    start: Source, experts: Mapping[str, Source], resources: Resources
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Which tensors are shared, which are an expert's own, and which only the base has.

    Tensors of integers and codes are the base's, and in none of the three.

    Raises:
        NamesMismatchError: lists those that the base and some experts have and others lack.
        MisfitError: lists codes, and matrices of integers, that are not the same in all.
    """
    models = (start, *experts.values())
    for source in experts.values():
        require_same_form(source, start)
    fixed = {name for source in models for name in source.opaque}
    coded = {name for source in models for name in source.codes}
    lone = sorted((n for n in coded if not all(n in source.specs for source in models)), key=natural_key)
    if lone:
        raise refusal(*models, names=lone)
    require_same({n: [(s, n) for s in models if n in s.specs] for n in sorted(fixed, key=natural_key)}, resources)
    copies = {id(source): Copies(source, source.specs) for source in models}
    common: list[str] = []
    left_out: list[str] = []
    wrong: list[str] = []
    for name, spec in start.specs.items():
        if name in fixed:
            continue
        having = [source for source in experts.values() if name in source.specs]
        if not having:
            left_out.append(name)
        elif len(having) < len(experts):
            if all(copies[id(source)].of(name) for source in (start, *having)):
                left_out.append(name)  # tied, and stored once more by some; those that store it once say the same
                continue
            lacking = [n for n, source in experts.items() if name not in source.specs]
            wrong.append(f"{spec}: not in {', '.join(lacking)}")
        elif all(source.specs[name].shape == spec.shape and source.specs[name].is_float for source in having):
            common.append(name)
    if wrong:
        raise NamesMismatchError(
            f"{len(wrong)} tensors are in the base and not in all experts", "give experts of one architecture", wrong
        )
    if not common:
        raise NamesMismatchError(f"no tensor of {start.label} is in all experts", "check that it is their base")
    shared = set(common)
    of_shared = {name: Copies(source, common) for name, source in experts.items()}
    own = {
        name: sorted(
            (n for n in source.specs if n not in fixed and n not in shared and not of_shared[name].of(n)),
            key=natural_key,
        )
        for name, source in experts.items()
    }
    return common, own, left_out


def other_integers(start: Source, experts: Mapping[str, Source], resources: Resources) -> list[str]:
    """Tensors of integers that an expert has otherwise than the base, or that only an expert has."""

    def integers(source: Source) -> dict[str, str]:
        return digest_tensors(source, [n for n, spec in source.specs.items() if not spec.is_float], resources)

    mine = integers(start)
    found = {n for source in experts.values() for n, digest in integers(source).items() if mine.get(n) != digest}
    return sorted(found, key=natural_key)
