"""LoRA files of diffusers, of all its generations: the part of the pipeline first, then the module, then the factor.

The scale is alpha / rank, with alpha from `lora_adapter_metadata` in the header or from `.alpha` keys; without either
alpha is the rank, as diffusers takes it where all modules have one rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from weightlab.adapters.changes import Addition, Change, Product
from weightlab.adapters.forms import AdapterFile, Model, scaled_config
from weightlab.adapters.forms._changes import Lengths
from weightlab.adapters.forms._modules import NETWORKS, Modules
from weightlab.adapters.patterns import matched
from weightlab.adapters.reading import Adapter
from weightlab.errors import MalformedFileError, UnsupportedFormatError, UsageError
from weightlab.files.foreign import parse_json, validated

_METADATA = "lora_adapter_metadata"
_COMPONENTS = (
    *("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior"),
    *("controlnet", "vae", "image_encoder", "connectors"),
)
_PROGRAMS = {"diffusion_model": NETWORKS, "model.diffusion_model": NETWORKS}  # ComfyUI's name for the network
_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<own>weight|bias)"
    r"|\.(?:lora|lora_linear_layer)\.(?P<side>down|up)\.weight"
    r"|\.processor\.(?P<attention>to_(?:q|k|v|out)|add_(?:q|k|v)_proj|to_add_out)_lora\.(?P<old>down|up)\.weight"
    r"|\.(?P<text>to_(?:q|k|v|out)|[qkv]_proj|out_proj)_lora\.(?P<older>down|up)\.weight"
    r"|\.lora_magnitude_vector(?:\.(?P<own_name>[^.]+))?(?P<magnitude>(?:\.weight)?)"
    r"|\.(?P<alpha>(?:lora\.)?alpha))"
)
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_FACTORS = re.compile(
    r".+\.(lora_[AB](\.[^.]+)?\.weight|lora(_linear_layer)?\.(up|down)\.weight)|.+_lora\.(up|down)\.weight"
)

# Language models whose own names begin with a word that is a part of a pipeline.
_LANGUAGE = re.compile(r"transformer\.(h|layer|encoder|wte|word_embeddings|blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn))\.")


class _Settings(BaseModel):
    """What counts of the settings of one part of a pipeline, which are peft's."""

    model_config = ConfigDict(extra="allow", strict=True)

    lora_alpha: Annotated[float, Field(gt=-1e30, lt=1e30)]
    alpha_pattern: dict[str, Annotated[float, Field(gt=-1e30, lt=1e30)]] | None = None
    use_rslora: bool | None = None


class _Diffusers:
    def claims(self, found: AdapterFile) -> bool:
        return any(
            _FACTORS.fullmatch(name)
            and not _LANGUAGE.match(name)
            and (_component(name)[0] or "_lora." in name or ".lora." in name)
            for name in found.names
        )

    def read(self, found: AdapterFile, model: Model) -> Adapter:
        """Raises:
        MalformedFileError: lists modules with a factor missing or of another rank.
        UnsupportedFormatError: lists keys that are of no known kind, or adapters of several names.
        UsageError: modules differ in rank and nothing tells alpha.
        """
        settings = parse_json(found.metadata.get(_METADATA) or "{}", f"{found.label}: {_METADATA}", dict[str, Any])
        grouped, unknown, names = _grouped(found.tensors())
        if len(names) > 1:
            raise UnsupportedFormatError(
                f"{found.label}: it holds {len(names)} adapters", "save them one by one", sorted(names)
            )
        if unknown:
            raise UnsupportedFormatError(
                f"{found.label}: a LoRA file of diffusers with tensors that are not computed here",
                "fuse it in diffusers (fuse_lora, then save_pretrained), and take a diff",
                unknown,
            )
        adapter = Adapter(found.label, scaled_config())
        modules = Modules(model.base)
        wrong = [f"{module}: {problem}" for module, parts in grouped.items() if (problem := _problem(parts))]
        if wrong:
            raise MalformedFileError(f"{found.label}: its factors make no sense", "get the file again", wrong)
        for module, parts in grouped.items():
            component, rest = _component(module)
            where = _PROGRAMS.get(component) or ((component, "") if component else NETWORKS)
            place = modules.find(where, rest, module)
            scale = _scale(found.label, module, grouped, settings)
            left, right = parts["up"].flatten(1) * scale, parts["down"].flatten(1)
            change: Change = Product(left, right)
            if "magnitude" in parts:
                change = Lengths(change, parts["magnitude"].reshape(-1))
            adapter.changes.setdefault(place.weight, []).append(change)
            if "bias" in parts:
                adapter.changes.setdefault(place.bias, []).append(Addition(parts["bias"] * scale))
        modules.raise_any(found.label)
        return adapter


def _component(name: str) -> tuple[str, str]:
    """(the part of a pipeline that a key begins with, the rest)."""
    for component in (*_COMPONENTS, *_PROGRAMS):
        if name.startswith(f"{component}."):
            return component, name.removeprefix(f"{component}.")
    return "", name


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str], set[str]]:
    """({module: {up, down, ...}}, keys that are none, names of adapters inside the keys)."""
    grouped: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    names: set[str] = set()
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        module = match["module"].removesuffix(".base_layer")
        if match["attention"]:
            module = f"{module}.{'to_out.0' if match['attention'] == 'to_out' else match['attention']}"
        elif match["text"]:
            text = module.startswith("text_encoder") or ".self_attn" in module
            named = _TEXT.get(match["text"], match["text"]) if text else match["text"]
            module = f"{module}.{'to_out.0' if named == 'to_out' else named}"
        names |= {name for name in (match["adapter"], match["own_name"]) if name and name != "weight"}
        if match["peft"]:
            part = {("A", "weight"): "down", ("B", "weight"): "up", ("B", "bias"): "bias"}.get(
                (match["peft"], match["own"])
            )
        elif match["alpha"]:
            part = "alpha"
        else:
            part = match["side"] or match["old"] or match["older"] or "magnitude"
        if part is None or part in grouped.get(module, {}):
            unknown.append(key)
        else:
            grouped.setdefault(module, {})[part] = tensor
    return grouped, unknown, names


def _problem(parts: Mapping[str, Tensor]) -> str:
    missing = [name for name in ("up", "down") if name not in parts]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    up, down = parts["up"], parts["down"]
    sizes = f"up is {list(up.shape)}, down is {list(down.shape)}"
    if up.ndim < 2 or down.ndim < 2 or not up.numel() or not down.numel() or any(n != 1 for n in up.shape[2:]):
        return sizes
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return f"alpha is {list(parts['alpha'].shape)}"
    return "" if up.shape[1] == down.shape[0] else f"the ranks differ: {sizes}"


def _scale(label: str, module: str, grouped: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any]) -> float:
    rank = grouped[module]["down"].shape[0]
    if "alpha" in grouped[module]:
        return float(grouped[module]["alpha"].reshape(-1)[0]) / rank
    component, rest = _component(module)
    own = {
        key.removeprefix(f"{component}."): value for key, value in settings.items() if _component(key)[0] == component
    }
    if "lora_alpha" in own:
        told = validated(own, _Settings, f"{label}: {_METADATA}")
        exact = {re.escape(key): alpha for key, alpha in (told.alpha_pattern or {}).items()}
        return float(matched(exact, rest, told.lora_alpha)) / (rank**0.5 if told.use_rslora else rank)
    ranks = Counter(
        p["down"].shape[0] for m, p in grouped.items() if _component(m)[0] == component and "alpha" not in p
    )
    if len(ranks) > 1:
        raise UsageError(
            f"{label}: its modules have {len(ranks)} ranks, and nothing in it tells their alpha",
            "save it with diffusers 0.35 or newer, which writes lora_adapter_metadata; or add MODULE.alpha keys",
            [f"rank {found}: {count} modules" for found, count in sorted(ranks.items())],
        )
    return 1.0


FORM = _Diffusers()
"""Plug-in for `weightlab.adapters.forms`."""
