"""Adapters of other forms, which are recognised by their keys and refused by their own name."""

from __future__ import annotations

import re

from weightlab.adapters.forms import AdapterFile, Model
from weightlab.adapters.keys import INNER
from weightlab.adapters.reading import Adapter
from weightlab.errors import UnsupportedFormatError

_KINDS = {
    "a LoRA of XLabs for Flux": re.compile(r".+\.processor\.(qkv|proj)_lora[12]\.(up|down)\.weight"),
    "a ControlNet in LoRA's form": re.compile(r"lora_controlnet|control_model\..+\.(up|down)"),
    "an embedding of textual inversion": re.compile(r"emb_params|string_to_param.*|clip_[lg]|<[^>]+>"),
    "an IP-Adapter": re.compile(r"(ip_adapter|image_proj)\..+"),
    "trained prompts": re.compile(r"(.+\.)?prompt_embeddings"),
    "a LoRA of a form that is not known": re.compile(r"(.*[._])?lora[._0-9A-Z].*"),
}


class _Unknown:
    """Asked after all others, by its place in the order of names."""

    def claims(self, found: AdapterFile) -> bool:
        return _kind(found) is not None

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        UnsupportedFormatError: always; says what it is.
        """
        raise UnsupportedFormatError(
            f"{found.label}: {_kind(found)}, which is not computed here",
            "merge it into its model with the program that made it, then take a diff",
            [f"its keys are like {name[:120]}" for name in sorted(found.names)[:4]],
        )


def _kind(found: AdapterFile) -> str | None:
    """What most of its keys are of: networks have parts called so, too; and a model may have adapters inside."""
    if any(f"{INNER}." in name for name in found.names):
        return None
    for kind, marks in _KINDS.items():
        if sum(marks.fullmatch(name) is not None for name in found.names) * 2 > len(found.names):
            return kind
    return None


FORM = _Unknown()
"""Plug-in for `weightlab.adapters.forms`."""
