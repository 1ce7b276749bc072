"""Whether a routed model gives what merged weights give, which is looked at on a batch of the user's.

Parts are added where layers are called. A network may use a layer's weights without calling it, or lay out samples so
that no shape tells which rows are whose; what is then left out or confused would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weightlab.errors import MisfitError
from weightlab.twin.parts import Parts

_NEAR = 1e-3
_ROUNDINGS, _SHARE = 6, 0.3
"""In 16 bits merged weights are themselves rounded, and a network that chooses (a mixture of experts) may choose
otherwise: a difference is rounding up to so many of the dtype's, relative to the output, or to that share of what the
parts do. Small networks of nine kinds came to 2.4 and 0.16, one of which a part was left out to 8 and 0.6."""
Held = Mapping[str, Mapping[str, Parts]]
"""{layer: {its name of a tensor: what experts add to it}}."""
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
    plain: list[Tensor] = []
    for sample in (0, len(weights) - 1) if several else (0,):
        own = weights[sample : sample + 1]
        with merged(module, layers, own[0]):
            theirs = given(None)
        if not theirs:
            raise MisfitError(
                f"{type(module).__name__} gives no tensor of floats that could be compared with merged weights",
                "let it give tensors, or a mapping or list of them; checked=False if it has been compared before",
            )
        if not plain and theirs and theirs[0].element_size() < 4:
            plain = given(None)
        if not several:
            if not _alike(given(own), theirs, plain):
                _refuse_parts(module, layers, called)
        elif not _alike(*([_of(t, sample, len(weights)) for t in each] for each in (ours, theirs, plain))):
            if not _alike(given(own), theirs, plain):
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


@contextmanager
def merged(module: nn.Module, layers: Held, weights: Tensor) -> Iterator[None]:
    """For the length of a block the module's tensors are those of one mixture [T]."""
    held = list(_with_parts(module, layers))
    before = [tensor.detach().to("cpu", copy=True) for tensor, _ in held]
    try:
        for tensor, part in held:
            # Of classifiers of several sizes there is one at a time, as a layer has it.
            own = functional.one_hot(weights.argmax(), len(weights)).float() if part.classes else weights
            tensor.data.copy_(tensor.data + part.mixed(own, tensor.shape).to(tensor.device))
        yield
    finally:
        for (tensor, _), values in zip(held, before, strict=True):
            tensor.data.copy_(values)


def _with_parts(module: nn.Module, layers: Held) -> Iterator[tuple[Tensor, Parts]]:
    """The module's tensors that have parts, each once."""
    seen: set[int] = set()
    for name, parts in layers.items():
        layer = module.get_submodule(name)
        state: dict[str, Tensor] = dict(layer.named_parameters()) | dict(layer.named_buffers())
        for own, part in parts.items():
            if id(state[own]) not in seen:
                seen.add(id(state[own]))
                yield state[own], part


def _refuse_parts(module: nn.Module, layers: Held, called: set[str]) -> None:
    raise MisfitError(
        f"{type(module).__name__} gives another output than with merged weights: it uses layers without calling them, "
        "or weights in more ways than one",
        "merge the parts: weightlab apply, or wl.patched",
        [name for name in layers if name not in called],
    )


def _alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], plain: Sequence[Tensor]) -> bool:
    """Whether outputs are the same but for rounding.

    Args:
        plain: what the shared model gives, where numbers have 16 bits. Else nothing.
    """
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        counts = their.isfinite() & (our != float("-inf"))  # classes that an expert does not have
        wanted = their[counts].double()
        apart = float((our[counts].double() - wanted).norm())
        near = (_ROUNDINGS * torch.finfo(our.dtype).eps if plain else _NEAR) * float(wanted.norm())
        if plain and plain[place].shape == counts.shape:
            near = max(near, _SHARE * float((wanted - plain[place][counts].double()).norm()))
        if not apart <= near:
            return False
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
