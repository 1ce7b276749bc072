"""Recognising checkpoints whose weights are codes: they are copied or patched exactly, never summed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightlab.errors import MalformedFileError
from weightlab.tensors.spec import TensorSpec

_COMPANIONS = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "absmax", "quant_state", "SCB", "qzeros")
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty when there is none.

    Raises:
        MalformedFileError: it is there and is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise MalformedFileError(f"{path}: {error}", "mend or replace the file") from error
    if not isinstance(config, dict):
        raise MalformedFileError(f"{path}: not a JSON object", "mend or replace the file")
    return config


def opaque_names(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> frozenset[str]:
    """Names that have no arithmetic: all of a quantised checkpoint, otherwise those of an opaque dtype."""
    companions = any(not _COMPANIONS.isdisjoint(name.split(".")[-2:]) for name in specs)
    if config.get("quantization_config") or companions:
        return frozenset(specs)
    return frozenset(name for name, spec in specs.items() if not spec.is_float)
