"""The keys of an adapter's file: what wrappers, trainers and the adapter's own name put around the network's names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from weightlab.errors import MalformedFileError, UnsupportedFormatError

PREFIX = "base_model.model."
INNER = ".base_layer"
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.((?P<adapter>[^.]+)\.)?(?P<own>.+)")
_LONGEST = 2000
_ORIGINAL = ".original_module."
_FACTORS = (".lora_A", ".lora_B", ".lora_E", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def plain_keys(label: str, keys: Iterable[str], prefix: str) -> dict[str, str]:
    """{key: the same without wrappers' names, `base_model.model.` and the adapter's name}; originals are left out.

    Args:
        prefix: what the names of the adapter's own parameters begin with, such as `lora_`.

    peft saves some modules twice, as `lm_head.weight` and as `lm_head.modules_to_save.weight`: these have one name.

    Raises:
        MalformedFileError: other keys become one; or a key is longer than names of modules are.
        UnsupportedFormatError: it holds adapters of several names.
    """
    plain = {key: _unwrapped(key) for key in keys if _ORIGINAL not in key}
    endless = [f"{key[:60]}…: {len(key):,} characters" for key in plain if len(key) > _LONGEST]
    if endless:
        raise MalformedFileError(f"{label}: no module has such a name", "do not use this file", endless)
    inside = [name for name in plain.values() if not name.startswith("base_model.")]
    if inside and all(name.startswith("module.") for name in inside):  # DeepSpeed, DistributedDataParallel
        plain = {key: name.removeprefix("module.") for key, name in plain.items()}
    own = re.compile(
        rf"(?P<head>.+\.{re.escape(prefix)}[A-Za-z_]+|.+\.trainable_tokens_delta)\.(?P<adapter>[^.]+)(?P<tail>(\..+)?)"
    )
    adapters: set[str] = set()
    found: dict[str, str] = {}
    for key, name in plain.items():
        saved, mine = _SAVED.fullmatch(name), own.fullmatch(name)
        found[key] = name
        if saved:
            adapters.update([saved["adapter"]] if saved["adapter"] else [])
            found[key] = f"{saved['module']}.{saved['own']}"
        elif mine and _is_adapters_name(mine["adapter"], mine["head"]):
            adapters.add(mine["adapter"])
            found[key] = mine["head"] + mine["tail"]
    if len(adapters) > 1:
        raise UnsupportedFormatError(
            f"{label}: it holds {len(adapters)} adapters", "save them one by one", sorted(adapters)
        )
    seen: dict[str, str] = {}
    twice = [
        f"{key} and {seen[name]}"
        for key, name in found.items()
        if seen.setdefault(name, key) != key and not any(_SAVED.fullmatch(plain[k]) for k in (key, seen[name]))
    ]
    if twice:
        raise MalformedFileError(f"{label}: these keys are for one tensor", "get the adapter again", twice)
    return found


def _unwrapped(key: str) -> str:
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _is_adapters_name(word: str, head: str) -> bool:
    """Whether the word after a parameter's name is the adapter's, and not a part of the parameter."""
    return word == "default" or (word not in ("weight", "bias") and head.endswith(_FACTORS))
