"""Whether a signature tells its corruption, how alike signatures are, and where in depth they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch

import weightlab as wl
from weightlab.tensors.layers import layers_in
from weightlab_evals.signatures.checkpoints import Checkpoints

Library = Mapping[str, wl.Patch]
"""Signatures by corruption."""


def ranks(asked: Library, library: Library) -> dict[str, int]:
    """For each signature that is asked about, the place of its own corruption in what `identify` says: 1 is right."""
    names = {patch.label: name for name, patch in library.items()}
    found = {}
    for corruption, patch in asked.items():
        matches = wl.identify(patch, list(library.values()))
        found[corruption] = 1 + [names[match.label] for match in matches].index(corruption)
    return found


def cosines(one: Library, two: Library) -> dict[str, float]:
    """Mean cosine of the same corruption in two libraries, and of different corruptions."""
    names = list(one)
    table = wl.compare([*one.values(), *(two[name] for name in names)]).cosines
    count = len(names)
    same = [table[i][count + i] for i in range(count)]
    different = [table[i][count + j] for i in range(count) for j in range(count) if i != j]
    return {"same": fmean(same), "different": fmean(different)}


def depths(checkpoints: Checkpoints, corruptions: Sequence[str]) -> dict[str, float]:
    """‖θr − θ0‖ / ‖θ0‖ of every layer, mean over corruptions, without running statistics."""
    start = checkpoints.start()
    names = [n for n, t in start.items() if t.is_floating_point() and "running_" not in n]
    found = {}
    for layer in layers_in(names, wl.file_order(checkpoints.module())):
        changes = []
        for corruption in corruptions:
            tuned = checkpoints.tuned("A", corruption)
            change = torch.cat([(tuned[n] - start[n]).flatten() for n in layer.tensors])
            before = torch.cat([start[n].flatten() for n in layer.tensors])
            changes.append(float(change.norm() / before.norm()))
        found[layer.name] = fmean(changes)
    return found
