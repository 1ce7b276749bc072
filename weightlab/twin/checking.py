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
_COARSE = 1e-4
_ROUNDINGS, _SHARE, _MOST = 6, 40, 0.3
"""Where products are coarser than `_COARSE` (16 bits, TF32, autocast) merged weights are themselves rounded, and a
network that chooses (a mixture of experts) may choose otherwise: a difference is rounding up to `_ROUNDINGS` of the
products', relative to the output, or `_SHARE` of them, at most `_MOST`, relative to what the parts do. Networks of
nine kinds with two layers, and of three with up to 32, came to 2.5 and 20, on CPUs and on a GPU."""
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
        if not plain:
            rounding = _rounding(module, layers, theirs)
            plain = given(None) if rounding > _COARSE else []
        if not several:
            if not _alike(given(own), theirs, plain, rounding):
                _refuse_parts(module, layers, called)
            continue
        rows = [[_of(tensor, sample, len(weights)) for tensor in each] for each in (ours, theirs, plain)]
        if not _alike(rows[0], rows[1], rows[2], rounding):
            if not _alike(given(own), theirs, plain, rounding):
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
        torch.clear_autocast_cache()  # which would go on with 16-bit copies of what the weights were
        yield
    finally:
        for (tensor, _), values in zip(held, before, strict=True):
            tensor.data.copy_(values)
        torch.clear_autocast_cache()


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


def _rounding(module: nn.Module, layers: Held, outputs: Sequence[Tensor]) -> float:
    """That of the coarsest products, of all dtypes that weights with parts and outputs have."""
    dtypes = {t.dtype for t, _ in _with_parts(module, layers) if t.is_floating_point()} | {t.dtype for t in outputs}
    return max(rounding_of_products(dtype, outputs[0].device) for dtype in dtypes)


def rounding_of_products(dtype: torch.dtype, device: torch.device) -> float:
    """How far products of a dtype are from exact ones on a device, relative; at least the dtype's unit.

    Products of 32 bits may be taken of fewer: by TF32, by `torch.set_float32_matmul_precision`, under autocast. No one
    setting says so; numbers that are multiplied do.
    """
    unit = torch.finfo(dtype).eps
    if dtype.itemsize < 4:
        return unit
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 64, generator=generator).to(dtype)
    kernel = torch.randn(8, 8, 3, 3, generator=generator).to(dtype)

    def products(values: Tensor, kernel: Tensor) -> list[Tensor]:
        return [values @ values, functional.conv2d(values.view(1, 8, 16, 32), kernel)]

    found = products(values.to(device), kernel.to(device))
    with torch.autocast("cpu", enabled=False):
        exact = products(values.double(), kernel.double())
    apart = [float((f.cpu().double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
    return max(unit, 3 * max(apart))  # what comes out is a third of a unit: roundings are of either sign


def _alike(ours: Sequence[Tensor], theirs: Sequence[Tensor], plain: Sequence[Tensor], rounding: float) -> bool:
    """Whether outputs are the same but for rounding.

    Args:
        plain: what the shared model gives, where products are coarse. Else nothing.
        rounding: of products, relative.
    """
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return False
    for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        counts = their.isfinite() & (our != float("-inf"))  # classes that an expert does not have
        wanted = their[counts].double()
        apart = float((our[counts].double() - wanted).norm())
        near = (_ROUNDINGS * rounding if plain else _NEAR) * float(wanted.norm())
        if plain and plain[place].shape == counts.shape:
            near = max(near, min(_MOST, _SHARE * rounding) * float((wanted - plain[place][counts].double()).norm()))
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
