"""What the study puts on a fine-tuned model: signatures, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import weightlab as wl
from weightlab.extract.norms import norm_tensors
from weightlab_evals.images.corruptions import corruptions
from weightlab_evals.signatures.checkpoints import Checkpoints, State
from weightlab_evals.signatures.training import as_input

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "spatter"),
    "digital": ("contrast", "brightness", "saturate", "elastic_transform", "pixelate", "jpeg_compression"),
}
DEPTHS = {"vgg": (2, 4, 6), "vgg_bn": (2, 4, 6), "vit": (1, 3, 5)}
"""The K that are tried: convolutions, or the embeddings and blocks; the last one is all but the head."""
NORMS = {"vgg": ("keep",), "vgg_bn": ("keep", "robust", "recalibrate"), "vit": ("keep",)}
_RECALIBRATION_BATCH = 125


@dataclass(frozen=True, slots=True)
class Form:
    """How a signature is taken: the first K layers, and what is done about those with running statistics."""

    depth: int
    norm: str = "keep"


class Patches:
    """Patches from the checkpoints of one domain."""

    def __init__(self, checkpoints: Checkpoints, domain: str = "A") -> None:
        self._checkpoints, self._domain = checkpoints, domain
        self._order = wl.file_order(checkpoints.module())

    def signature(self, corruption: str, form: Form, encode: str = "dense:fp32") -> wl.Patch:
        """The Robust Weight Signature against a corruption."""
        have = self._checkpoints
        measured = None
        if form.norm == "recalibrate":
            plain = self.signature(corruption, Form(form.depth, "keep"))
            measured = self._measured(wl.apply(have.tuned(self._domain), plain), corruption)
        return wl.signature(
            have.start(),
            have.tuned(self._domain),
            have.tuned(self._domain, corruption),
            layers=f"first:{form.depth}",
            order=self._order,
            norm=form.norm,
            statistics=measured,
            encode=encode,
        )

    def unprojected(self, corruption: str, like: wl.Patch) -> wl.Patch:
        """θr − θ0 of the tensors that `like` has."""
        return self._instead(like, self._change(self._checkpoints.start(), corruption))

    def from_clean(self, corruption: str, like: wl.Patch) -> wl.Patch:
        """θr − θc of the tensors that `like` has."""
        return self._instead(like, self._change(self._checkpoints.tuned(self._domain), corruption))

    def random(self, corruption: str, like: wl.Patch) -> wl.Patch:
        """Normally distributed, each tensor as long as that of `like`."""
        generator = torch.Generator().manual_seed(self._checkpoints.seed * 100 + corruptions().index(corruption))

        def normal(name: str, given: Tensor) -> Tensor:
            noise = torch.randn(given.shape, generator=generator)
            drawn: Tensor = noise * (given.norm() / noise.norm())
            return drawn

        return self._instead(like, normal)

    def _change(self, before: State, corruption: str) -> Callable[[str, Tensor], Tensor]:
        after = self._checkpoints.tuned(self._domain, corruption)
        return lambda name, given: after[name] - before[name]

    def _instead(self, like: wl.Patch, delta: Callable[[str, Tensor], Tensor]) -> wl.Patch:
        """A patch as `like`, with other weights; what that one says of normalisation layers stays."""
        clean = self._checkpoints.tuned(self._domain)
        base = {name: clean[name] for name in like.records}
        tuned = wl.apply(base, like)
        affine, statistics = norm_tensors(base)
        for name in base.keys() - {*statistics, *(affine if statistics else ())}:
            tuned[name] = base[name] + delta(name, tuned[name] - base[name])
        return wl.diff(base, tuned, encode="dense:fp32")

    def statistics_of(self, corruption: str) -> State:
        """Running statistics of the corruption-trained model."""
        return {n: t for n, t in self._checkpoints.tuned(self._domain, corruption).items() if "running_" in n}

    def recalibrated(self, corruption: str) -> State:
        """Running statistics of the clean model, measured on corrupted training images."""
        return self._measured(self._checkpoints.tuned(self._domain), corruption)

    def _measured(self, state: Mapping[str, Tensor], corruption: str) -> State:
        module = self._checkpoints.module()
        module.load_state_dict(state)
        shown = self._checkpoints.shown(self._domain, "train", corruption).images
        return wl.recalibrate(module, map(as_input, torch.split(shown, _RECALIBRATION_BATCH)))


def others(corruption: str) -> list[str]:
    """One corruption of each family that this one is not of."""
    (own,) = (family for family in FAMILIES.values() if corruption in family)
    return [family[own.index(corruption) % len(family)] for family in FAMILIES.values() if family is not own]
