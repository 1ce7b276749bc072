"""Order and grouping of tensor names."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key by which `layers.2` comes before `layers.10`."""
    return tuple((0, int(t), "") if t.isdigit() else (1, 0, t) for t in _DIGITS.split(name) if t)


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to and with the first number, else without its last word.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', 'lm_head')
    """
    words = name.split(".")
    for index, word in enumerate(words[:-1]):
        if word.isdigit():
            return ".".join(words[: index + 1])
    return ".".join(words[:-1]) or name
