"""Adapters of kohya's trainer and of LyCORIS: one file, a module's name with underscores, `alpha` beside the factors.

Every kind is scaled by alpha / rank; without alpha by 1. Of LoKr the rank is that of the side that is in factors, and
two whole sides are not scaled. Sources: kohya-ss/sd-scripts `networks/lora.py`, KohakuBlueleaf/LyCORIS `functional/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from weightlab.adapters.changes import Change, Product
from weightlab.adapters.forms import AdapterFile, Model, scaled_config
from weightlab.adapters.forms._changes import Difference, Hadamard, Kronecker, Lengths, LowRank
from weightlab.adapters.forms._modules import NETWORKS, Modules
from weightlab.adapters.keys import PREFIX
from weightlab.adapters.reading import Adapter
from weightlab.errors import MalformedFileError, UnsupportedFormatError

_PARTS = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(up|down|mid)\.weight|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)|alpha"
    r"|dora_scale|diff|diff_b|w_norm|b_norm)"
)
_MARKS = re.compile(r".+\.(lora_(up|down)\.weight|hada_w1_a|lokr_w[12](_a)?|w_norm|oft_blocks|oft_diag)")
_PREFIX = re.compile(
    r"(?P<prefix>lora_unet|lora_te[123]?|lora_prior_unet|lora_transformer|lycoris|oft_unet)_(?P<rest>.+)"
)
_WHERE = {
    "lora_te": ("text_encoder", ""),
    "lora_te1": ("text_encoder", ""),
    "lora_te2": ("text_encoder_2", ""),
    "lora_te3": ("text_encoder_3", "text_encoder_2", ""),
    "lora_prior_unet": ("prior", ""),
}
_NAMED = ("diffusion_model.", "unet.", "transformer.")  # what names with dots begin with in other programs
_OTHER_KINDS = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "rescale": "OFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "on_input": "IA3",
    "weight": "IA3",
    "scalar": "a trained scalar of LyCORIS",
}


class _Kohya:
    def claims(self, found: AdapterFile) -> bool:
        mine = any(_MARKS.fullmatch(name) or _PREFIX.match(name) for name in found.names)
        return mine and not any(name.startswith(PREFIX) for name in found.names)  # those are peft's

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UnsupportedFormatError: lists the tensors of kinds that are not computed (OFT, IA3, GLoRA).
        MalformedFileError: lists modules whose factors are missing or make no sense.
        MisfitError: names that fit more than one of the model's modules.
        """
        grouped: dict[str, dict[str, Tensor]] = {}
        unknown: list[str] = []
        for key, tensor in found.tensors().items():
            parts = _PARTS.fullmatch(key)
            if parts is None:
                unknown.append(f"{key}: {_kind(key)}")
            else:
                grouped.setdefault(parts["module"], {})[parts["part"]] = tensor
        if unknown:
            raise UnsupportedFormatError(
                f"{found.label}: a LoRA file of kohya's or LyCORIS's kind with tensors that are not computed here",
                "merge it into its model with the program that made it, then take a diff",
                unknown,
            )
        adapter = Adapter(found.label, scaled_config(found.metadata.get("ss_sd_model_name")))
        modules, wrong = Modules(model.base), []
        for name, tensors in grouped.items():
            parts_of, rest = _place(name)
            place = modules.find(parts_of, rest, name)
            try:
                for own, change in _changes(tensors).items():
                    adapter.changes.setdefault(place.weight if own == "weight" else place.bias, []).append(change)
            except (ValueError, RuntimeError) as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            raise MalformedFileError(f"{found.label}: its factors make no sense", "get the file again", wrong)
        modules.raise_any(found.label)
        return adapter


def _kind(key: str) -> str:
    return next((kind for end, kind in _OTHER_KINDS.items() if key.endswith(f".{end}")), "of a kind that is not known")


def _place(name: str) -> tuple[tuple[str, ...], str]:
    """(the parts of a pipeline that a module may be in, its name there)."""
    found = _PREFIX.fullmatch(name)
    if found:
        return _WHERE.get(found["prefix"], NETWORKS), found["rest"]
    return NETWORKS, next((name.removeprefix(p) for p in _NAMED if name.startswith(p)), name)


def _changes(parts: Mapping[str, Tensor]) -> dict[str, Change]:
    """{"weight" or "bias": its change} of one module.

    Raises:
        ValueError: what is missing, or does not fit.
    """
    left = {name for name in parts if name not in ("alpha", "dora_scale")}
    found: dict[str, Change] = {}
    if "lora_up.weight" in left or "lora_down.weight" in left:
        found["weight"] = _lora(parts)
        left -= {"lora_up.weight", "lora_down.weight", "lora_mid.weight"}
    elif any(name.startswith("hada_") for name in left):
        found["weight"] = _hadamard(parts)
        left = {name for name in left if not name.startswith("hada_")}
    elif any(name.startswith("lokr_") for name in left):
        found["weight"] = _kronecker(parts)
        left = {name for name in left if not name.startswith("lokr_")}
    for weight, bias in (("diff", "diff_b"), ("w_norm", "b_norm")):
        if weight in left and "weight" not in found:
            found["weight"] = Difference(parts[weight])
            left.discard(weight)
        if bias in left:
            found["bias"] = Difference(parts[bias])
            left.discard(bias)
    if left or not found:
        raise ValueError(f"{', '.join(sorted(left)) or 'its factors'}: of two kinds, or missing")
    if "dora_scale" in parts:
        if "weight" not in found:
            raise ValueError("dora_scale without factors")
        found["weight"] = Lengths(found["weight"], parts["dora_scale"])
    return found


def _scale(parts: Mapping[str, Tensor], rank: int) -> float:
    alpha = parts.get("alpha")
    if alpha is None:
        return 1.0
    if alpha.numel() != 1:
        raise ValueError(f"alpha is {list(alpha.shape)}")
    return float(alpha.reshape(-1)[0]) / rank


def _needed(parts: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return [parts[name] for name in names]


def _lora(parts: Mapping[str, Tensor]) -> Product:
    """LoRA, of convolutions too: up is 1 × 1, and the kernel is in down, or between the two."""
    up, down = _needed(parts, "lora_up.weight", "lora_down.weight")
    sizes = f"up is {list(up.shape)}, down is {list(down.shape)}"
    if up.ndim < 2 or down.ndim < 2 or not up.numel() or not down.numel() or any(n != 1 for n in up.shape[2:]):
        raise ValueError(sizes)
    left, right, rank = up.flatten(1), down.flatten(1), down.shape[0]
    middle = parts.get("lora_mid.weight")
    if middle is not None:
        if middle.ndim < 3 or middle.shape[1] != rank or any(n != 1 for n in down.shape[2:]):
            raise ValueError(f"{sizes}, mid is {list(middle.shape)}")
        right = torch.einsum("ab...,bi->ai...", middle, right).flatten(1)
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"the ranks differ: {sizes}")
    return Product(left * _scale(parts, rank), right.contiguous())


def _hadamard(parts: Mapping[str, Tensor]) -> Hadamard:
    one_a, one_b, two_a, two_b = _needed(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        raise ValueError("hada_t1 and hada_t2 come together")
    one = LowRank(one_a, one_b, parts.get("hada_t1"))
    two = LowRank(two_a, two_b, parts.get("hada_t2"))
    _refuse(one, two)
    return Hadamard(one, two, _scale(parts, one_b.shape[0]))


def _refuse(*factors: LowRank) -> None:
    problems = [factor.problem for factor in factors if factor.problem]
    if problems:
        raise ValueError("; ".join(problems))


def _kronecker(parts: Mapping[str, Tensor]) -> Kronecker:
    ranks: set[int] = set()
    sides: list[Tensor] = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append(parts[side])
            continue
        left, right = _needed(parts, f"{side}_a", f"{side}_b")
        factors = LowRank(left, right, parts.get("lokr_t2") if side == "lokr_w2" else None)
        _refuse(factors)
        ranks.add(right.shape[0])
        sides.append(factors.whole())
    if len(ranks) > 1:
        raise ValueError(f"its two sides have the ranks {' and '.join(map(str, sorted(ranks)))}")
    one, two = sides
    if one.ndim > 2 and all(n == 1 for n in one.shape[2:]):
        one = one.flatten(1)
    if one.ndim != 2 or two.ndim < 2 or not one.numel() or not two.numel():
        raise ValueError(f"its sides are {list(one.shape)} and {list(two.shape)}")
    return Kronecker(one, two, _scale(parts, ranks.pop()) if ranks else 1.0)


FORM = _Kohya()
"""Plug-in for `weightlab.adapters.forms`."""
