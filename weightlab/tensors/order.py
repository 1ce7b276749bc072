"""Order and grouping of tensor names."""

from __future__ import annotations

import re

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key by which `layers.2` comes before `layers.10`.

    Numbers are compared by their lengths and digits: Python makes no int of more than 4,300 digits.
    """
    return tuple(_number(t) if "0" <= t[0] <= "9" else (1, 0, t) for t in _DIGITS.split(name) if t)


def _number(digits: str) -> tuple[int, int, str]:
    plain = digits.lstrip("0")
    return 0, len(plain), plain


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
