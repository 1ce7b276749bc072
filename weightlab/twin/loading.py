"""The shared model of a twin as a network of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MissingInputError, NamesMismatchError, UsageError, WrongBaseError
from weightlab.files.digest import fingerprint
from weightlab.networks.configuration import class_of, configuration_of
from weightlab.networks.plausible import within_bounds
from weightlab.networks.trust import trust_remote_code
from weightlab.ops.alike import clean_source
from weightlab.ops.operands import PathLike, model_path
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry, fit
from weightlab.patches.patched_source import PatchedSource
from weightlab.sources.virtual.chosen import ChosenSource
from weightlab.stream.executor import Resources, run
from weightlab.tensors.spec import BY_TORCH, TensorSpec
from weightlab.tensors.workspace import Workspace
from weightlab.twin.folder import EXPERTS, Twin


def shared_module(
    twin: Twin,
    base: PathLike | None,
    architecture: str | None,
    dtype: torch.dtype | None,
    wait: float,
    resources: Resources,
) -> nn.Module:
    """The base with the shared part on it, in the class of the experts; what experts bring along is zero in it.

    Raises:
        MissingInputError, WrongBaseError, NamesMismatchError, UsageError: see `TwinModel.from_pretrained`.
    """
    state = shared_state(twin, base_of_twin(twin, base, wait, resources), wait, resources)
    state |= {n: torch.zeros(shape, dtype=_common_dtype(state)) for n, shape in _widest_heads(twin).items()}
    specs = {n: TensorSpec(n, BY_TORCH[tensor.dtype].name, tuple(tensor.shape)) for n, tensor in state.items()}
    folder, config = _configuration(twin, specs)
    known: Any = class_of(folder, config, architecture)
    name = known.__name__
    wanted = _common_dtype(state) if dtype is None else dtype
    with within_bounds(specs):
        module, found = known.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=wanted,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code(),
        )
    lacking = sorted(found["missing_keys"]) + [str(each) for each in found["mismatched_keys"]]
    if lacking:
        raise NamesMismatchError(
            f"{name} has {len(lacking)} tensors that neither base nor experts have so", "give architecture=", lacking
        )
    module.eval()
    made: nn.Module = module
    return made


def fill(module: nn.Module, twin: Twin, base: PathLike | None, wait: float, resources: Resources) -> None:
    """Gives a network of any kind the weights of the shared model; what experts bring along becomes zero.

    Raises:
        NamesMismatchError: lists the tensors in which they differ.
        MissingInputError, WrongBaseError: see `base_of_twin`.
    """
    state = shared_state(twin, base_of_twin(twin, base, wait, resources), wait, resources)
    state |= {name: torch.zeros(shape) for name, shape in _widest_heads(twin).items()}
    wanted = dict(module.state_dict(keep_vars=True))
    wrong = [
        f"{n}: {list(t.shape)} in the network, {list(state[n].shape)} in the twin"
        for n, t in wanted.items()
        if n in state and t.shape != state[n].shape
    ]
    wrong += [f"{n}: not in the twin" for n in wanted if n not in state]
    wrong += [f"{n}: not in the network" for n in state if n not in wanted]
    if wrong:
        raise NamesMismatchError(f"{twin.path} is no twin of {type(module).__name__}", "give its network", wrong)
    module.load_state_dict(state)


def base_of_twin(twin: Twin, base: PathLike | None, wait: float, resources: Resources) -> PathLike:
    """Where the base is, which is looked at.

    Raises:
        MissingInputError: it is not where it was.
        WrongBaseError: it is another than the twin was made from.
    """
    told = twin.header.base
    if base is None:
        place = twin.path / (told.get("path") or "")
        if not told.get("path") or not place.exists():
            where = told.get("name") or "the checkpoint that it was made from"
            raise MissingInputError(f"{twin.path}: its base is not at {place}", f"give base=, the path of {where}")
        base = place
    with ExitStack() as stack:
        start = clean_source(stack, model_path(base), wait, resources)
        found = fingerprint(digest_tensors(start, start.specs, resources))
    if found != told["fingerprint"]:
        raise WrongBaseError(
            f"{base} is not the base of {twin.path}",
            f"give the one that it was made from, {told.get('name') or told.get('path')}",
            [f"its tensors have the fingerprint {found}, those of the base {told['fingerprint']}"],
        )
    return base


def shared_state(twin: Twin, base: PathLike, wait: float, resources: Resources) -> dict[str, Tensor]:
    """The tensors of the shared model, under the files' names, in the base's dtypes."""
    with ExitStack() as stack:
        twin.shared.verify(resources)
        start = clean_source(stack, model_path(base), wait, resources)
        kept = [n for n in start.specs if n not in twin.header.left_out]
        chosen = ChosenSource(start, kept)
        source = PatchedSource(chosen, fit(chosen, [StackEntry(twin.shared, 1.0)]))
        state = {name: spec.empty() for name, spec in source.specs.items()}

        def read(name: str, workspace: Workspace) -> None:
            source.read(name, 0, state[name].reshape(-1).view(torch.uint8))

        run(sorted(state, key=lambda n: -state[n].numel()), read, resources)
    return state


def _configuration(twin: Twin, specs: Mapping[str, TensorSpec]) -> tuple[Path, Any]:
    """The experts' (of the one with the most classes), or the base's, and the folder that it is in.

    Raises:
        UsageError: experts are of different classes.
        MalformedFileError, UnknownNetworkError: see `configuration_of`.
    """
    folders = [twin.path / EXPERTS / name for name in twin.names]
    having = [folder for folder in folders if (folder / "config.json").is_file()]
    configs = [(folder, configuration_of(folder, specs)) for folder in having]
    kinds = {tuple(config.architectures or ()) for _, config in configs}
    if len(kinds) > 1:
        raise UsageError("the experts are of different classes", "give architecture=", sorted(map(str, kinds)))
    if configs:
        return max(configs, key=lambda pair: getattr(pair[1], "num_labels", 0) or 0)
    if not (twin.path / "config.json").is_file():
        raise MissingInputError(
            f"{twin.path}: no config.json of base or experts", "make the module, and give it to TwinModel(module, twin)"
        )
    return twin.path, configuration_of(twin.path, specs)


def _widest_heads(twin: Twin) -> dict[str, tuple[int, ...]]:
    """{tensor that experts bring along: the largest shape}."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in twin.names:
        for head in twin.heads(name):
            shapes[head] = max(shapes.get(head, ()), tuple(twin.exclusive[name].records[head].shape))
    return shapes


def _common_dtype(state: dict[str, Tensor]) -> torch.dtype:
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return max(dict.fromkeys(floats), key=floats.count)
