"""Whether a routed model gives what merged weights give, which is looked at on a batch of the user's.

Parts are added where layers are called. A network may use a layer's weights without calling it, or lay out samples so
that no shape tells which rows are whose; what is then left out or confused would be wrong in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.errors import MisfitError
from weightlab.twin.merging import Held, merged
from weightlab.twin.rounding import noise_of

_NEAR = 1e-3
_NOISE = 3
"""Outputs are the same if they are within `_NEAR`, relative, or, where products are coarse, within so many times their
noise. Networks of 13 kinds, with up to 24 layers, in 16 bits and under autocast, came to 1.7 times it."""
Mixing = Callable[[Tensor | None], AbstractContextManager[None]]


def require_merged(
    module: nn.Module,
    layers: Held,
    mixing: Mixing,
    mixtures: tuple[int, int],
    called: set[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    independent: bool,
) -> None:
    """Makes sure that the first and the last sample get what weights give into which their mixtures are merged.

    Mixtures are ones of its own: every expert has a share, and samples that are neighbours have other ones.
    The tensors that have parts are held twice meanwhile, the second time in the memory of the CPU.

    Args:
        mixtures: how many (one for each sample, or one for all), and of how many experts.
        called: the layers that were called.
        independent: whether what one sample gives hangs on no other; if it may, one mixture for all is looked at.

    Raises:
        MisfitError: they do not, and whether the parts or the samples are to blame; or there is nothing to compare.
    """

    def given(mixture: Tensor | None) -> list[Tensor]:
        with mixing(mixture):
            return [t.clone() for t in _tensors_in(module(*args, **kwargs)) if t.is_floating_point()]

    weights = _of_every_expert(*mixtures).to(next(module.parameters()).device)
    several = independent and len(weights) > 1
    ours = given(weights) if several else []
    for sample in (0, len(weights) - 1) if several else (0,):
        own = weights[sample : sample + 1]
        with merged(module, layers, own[0]):
            theirs = given(None)
        sizes = [t.numel() for t in theirs if not several or _of(t, sample, len(weights)).numel()]
        noise = noise_of(module, layers, own[0], lambda: given(None), theirs, min(sizes, default=1))
        typical = [_typical(each) for each in noise]
        if several:
            rows = [[_of(tensor, sample, len(weights)) for tensor in each] for each in (ours, theirs, noise)]
            alike = _alike(module, rows[0], rows[1], rows[2], typical)
        else:
            alike = _alike(module, given(own), theirs, noise, typical)
        if not alike:
            if not several or not _alike(module, given(own), theirs, noise, typical):
                _refuse_parts(module, layers, called)
            raise MisfitError(
                f"{type(module).__name__}: what one sample gives hangs on the others' weights, so that samples cannot "
                "be told apart",
                "route by group (group=True), or one sample at a time; if samples of a batch are meant to be compared: "
                "independent=False",
            )


def _of_every_expert(samples: int, experts: int) -> Tensor:
    """Weights [samples, T] whose rows sum to 1."""
    shares = 7 + (3 * torch.arange(samples)[:, None] + 2 * torch.arange(experts)) % 7
    return shares / shares.sum(1, keepdim=True)


def _refuse_parts(module: nn.Module, layers: Held, called: set[str]) -> None:
    raise MisfitError(
        f"{type(module).__name__} gives another output than with merged weights: it uses layers without calling them, "
        "or weights in more ways than one",
        "merge the parts: weightlab apply, or wl.patched",
        [name for name in layers if name not in called],
    )


def _typical(noise: Tensor) -> float:
    """That of a number, over all samples: those of one may be few."""
    return float(torch.linalg.vector_norm(noise.nan_to_num(0, 0, 0))) / math.sqrt(max(1, noise.numel()))


def _alike(
    module: nn.Module,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    noise: Sequence[Tensor],
    typical: Sequence[float],
) -> bool:
    """Whether outputs are the same but for rounding.

    Args:
        noise: of each number of theirs; nothing where products are exact enough.
        typical: of a number of each output.

    Raises:
        MisfitError: there is nothing that could be compared.
    """
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    compared = 0
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        counts = their.isfinite() & (our != float("-inf"))  # classes that an expert does not have
        wanted = their[counts].cpu().double()  # which not all accelerators have
        compared += wanted.numel()
        near = _NEAR * float(wanted.norm())
        if noise:
            own = noise[place][counts].cpu().double().nan_to_num_(0, 0, 0)
            near = max(near, _NOISE * float(own.norm()), _NOISE * typical[place] * math.sqrt(wanted.numel()))
        if not float((our[counts].cpu().double() - wanted).norm()) <= near:
            return False
    if not compared:
        raise MisfitError(
            f"{type(module).__name__} gives nothing of each sample that is finite, to be compared with merged weights",
            "let it give tensors of floats with a row for each sample, or a mapping or list of them; checked=False if "
            "it has been compared before",
        )
    return True


def _of(tensor: Tensor, sample: int, samples: int) -> Tensor:
    """The rows of one sample; nothing of a tensor that does not have a number of rows for each."""
    rows = len(tensor) // samples if tensor.ndim and len(tensor) % samples == 0 else 0
    return tensor[sample * rows : (sample + 1) * rows] if tensor.ndim else tensor.new_empty(0)


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors of what a network gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)
