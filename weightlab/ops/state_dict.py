"""Patches on an ordinary state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from weightlab.files.digest import tensor_hasher
from weightlab.ops.new_checkpoint import checked_fit
from weightlab.patches.compute import Offences, check_result, compute_tile, read_clean
from weightlab.patches.fit import StackEntry, Target
from weightlab.sources.virtual.memory import MemorySource
from weightlab.stream.executor import Resources, run
from weightlab.tensors.tiles import tiles
from weightlab.tensors.workspace import Workspace


def patch_state_dict(
    state: Mapping[str, Tensor],
    entries: Sequence[StackEntry],
    resources: Resources,
    *,
    allow_nonfinite: bool,
    allow_growth: bool = False,
) -> dict[str, Tensor]:
    """A new dict with the patches on; tensors that no patch touches are the same objects, tied ones stay tied.

    Raises:
        MisfitError: the patches do not fit; every offender is listed.
    """
    source = MemorySource(state)
    targets = checked_fit(source, entries, resources, allow_growth=allow_growth).targets
    made = {n: t.result.empty() for n, t in targets.items() if t.mode != "remove"}
    offences = Offences()

    def tasks() -> Iterator[tuple[Target, int, int]]:
        for name in made:
            for start, stop in tiles(targets[name].result.stored.numel):
                yield targets[name], start, stop

    def work(task: tuple[Target, int, int], workspace: Workspace) -> None:
        target, start, stop = task
        clean = read_clean(source, target, start, stop, workspace)
        result = compute_tile(target, start, stop, clean, workspace, offences, allow_nonfinite)
        begin = start * target.result.stored.type.itemsize
        flat = made[target.spec.name].reshape(-1).view(torch.uint8)
        flat[begin : begin + result.numel()] = result

    run(tasks(), work, resources)
    offences.raise_any()
    for name, tensor in made.items():
        if targets[name].result_digest is not None:
            hasher = tensor_hasher(targets[name].result.dtype, targets[name].result.shape)
            hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            check_result(targets[name], hasher.hexdigest())
    patched: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stored = source.aliases.get(name, name)
        if stored not in targets:
            patched[name] = tensor
        elif stored in made:
            if made[stored].device != tensor.device:
                made[stored] = made[stored].to(tensor.device)
            patched[name] = made[stored]
    return patched | {n: t for n, t in made.items() if n not in patched}
