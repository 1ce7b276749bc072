"""The kinds of PEFT adapters (`PeftType`): which become changes of weights, by whom they are computed, which cannot."""

from __future__ import annotations

from dataclasses import dataclass

from weightlab.errors import UnsupportedFormatError

OWN = ("LORA", "LN_TUNING", "TRAINABLE_TOKENS")
"""Computed here; for the others peft's own layers do it, see `peft_layers`."""


@dataclass(frozen=True, slots=True)
class PeftKind:
    """How adapters of a kind are computed by peft's layers.

    Attributes:
        prefix: what the names of its tensors begin with, after the module's name.
        changes: which of a module's tensors it changes.
        shared: whether modules share parameters, so that all of them are made at once.
        ordered: whether what a module gets depends on its place among the others.
    """

    prefix: str
    changes: tuple[str, ...] = ("weight",)
    shared: bool = False
    ordered: bool = False


_BOTH = ("weight", "bias")
THROUGH_PEFT = {
    "LORA": PeftKind("lora_"),  # its variants: see `config.VARIANTS`
    "ADALORA": PeftKind("lora_"),
    "ADAMSS": PeftKind("adamss_", _BOTH),
    "BEFT": PeftKind("beft_", ("bias",)),
    "BOFT": PeftKind("boft_"),
    "C3A": PeftKind("c3a_"),
    "DEFT": PeftKind("deft_"),
    "DELORA": PeftKind("delora_"),
    "FOURIERFT": PeftKind("fourierft_"),
    "FROD": PeftKind("frod_", shared=True),
    "GLORA": PeftKind("glora_", _BOTH),
    "GRALORA": PeftKind("gralora_"),
    "HIRA": PeftKind("hira_"),
    "HRA": PeftKind("hra_"),
    "IA3": PeftKind("ia3_", _BOTH),
    "LOHA": PeftKind("hada_"),
    "LOKR": PeftKind("lokr_"),
    "MISS": PeftKind("miss_"),
    "OFT": PeftKind("oft_"),
    "OSF": PeftKind("osf_"),
    "PEANUT": PeftKind("peanut_"),
    "PSOFT": PeftKind("psoft_"),
    "PVERA": PeftKind("pvera_", shared=True),
    "RANDLORA": PeftKind("randlora_", shared=True),
    "ROAD": PeftKind("road_", _BOTH),
    "SHIRA": PeftKind("shira_"),
    "SUPERTUNING": PeftKind("supertuning_"),
    "TINYLORA": PeftKind("tinylora_", shared=True, ordered=True),
    "UNILORA": PeftKind("unilora_", shared=True, ordered=True),
    "VBLORA": PeftKind("vblora_", shared=True),
    "VERA": PeftKind("vera_lambda_", shared=True),
    "WAVEFT": PeftKind("waveft_"),
}

_PROMPT = "it trains vectors that are put before the input, and no weight of the model"
NOT_FOLDED = {
    "ADAPTION_PROMPT": "it adds gated prompts inside the attention, and changes no weight of the model",
    "CARTRIDGE": "it trains keys and values that attention reads, and no weight of the model",
    "CPT": _PROMPT,
    "LILY": "its routers mix matrices anew for each input, so no one weight does what it does",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "POLY": "its router mixes adapters by task, so no one weight does what it does",
    "PREFIX_TUNING": "it trains keys and values that attention reads, and no weight of the model",
    "PROMPT_TUNING": _PROMPT,
    "SHADOW": "a network beside the model works on each input, so no one weight does what it does",
    "XLORA": "it weighs several adapters anew for each input, so no one weight does what it does",
}


def refuse_kind(label: str, kind: str) -> None:
    """Raises:
    UnsupportedFormatError: adapters of that kind cannot become changes of weights, or it is not known.
    """
    if kind in NOT_FOLDED:
        raise UnsupportedFormatError(
            f"{label}: a PEFT adapter of the kind {kind} cannot become a patch: {NOT_FOLDED[kind]}",
            "use it with peft, on the model: PeftModel.from_pretrained(model, adapter)",
        )
    if kind not in OWN and kind not in THROUGH_PEFT:
        raise UnsupportedFormatError(
            f"{label}: a PEFT adapter of the kind {kind[:60]}, which this version of weightlab does not know",
            "merge it into its model with the peft that made it (merge_and_unload), then take a diff",
        )
