"""A picture of where in depth weights changed, or how large they are."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightlab.errors import InputError, UsageError
from weightlab.files.atomic import atomic_file, refuse_existing
from weightlab.ops.inspect import Inspection, TensorRow
from weightlab.tensors.order import layer_of

_MOST_LABELS = 40


def plot(found: Inspection, path: Path, *, overwrite: bool = False) -> None:
    """Draws an inspection as a PNG: layers in order × kinds of tensors, and a bar a layer.

    The colour is log10 of ‖Δ‖/‖W‖ where the base is known, else of the root mean square of the elements.

    Raises:
        InputError: there are no norms to draw.
        UsageError, NotPatchableError: see `check_picture`.
    """
    check_picture(path, overwrite=overwrite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in found.tensors if r.norm is not None]
    if not rows:
        raise InputError(f"{found.path}: no norms to draw", "; ".join(found.notes) or "give --base")
    relative = any(r.relative is not None for r in rows)
    layers = list(dict.fromkeys(layer_of(r.name) for r in rows))
    kinds = list(dict.fromkeys(_kind(r.name) for r in rows))
    grid = _grid(rows, kinds, layers, relative)
    width = min(24.0, 5.0 + 0.28 * len(layers))
    height = min(40.0, 3.4 + 0.22 * len(kinds))
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=[2.0, 1.2 + 0.22 * len(kinds)])
    what = "‖Δ‖ / ‖W‖" if relative else "root mean square"
    _bars(above, found, layers, relative, what)
    image = below.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    below.set_yticks(range(len(kinds)), [shortened(k) for k in kinds], fontsize=7)
    step = max(1, math.ceil(len(layers) / _MOST_LABELS))
    shown = range(0, len(layers), step)
    below.set_xticks(list(shown), [shortened(layers[i]) for i in shown], rotation=90, fontsize=7)
    figure.colorbar(image, ax=below, label=f"log10 {what}", fraction=0.03)
    figure.suptitle(shortened(Path(found.path).name, 70), fontsize=10)
    with atomic_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def check_picture(path: Path, *, overwrite: bool = False) -> None:
    """Checks, before any work, that a picture can go to `path`.

    Raises:
        UsageError: matplotlib is not installed, or the name does not end in .png.
        NotPatchableError: there is something already.
    """
    if path.suffix != ".png":
        raise UsageError(f"{path}: pictures are PNG files", "give a name that ends in .png")
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib", "pip install 'weightlab[plot]'")
    refuse_existing(path, overwrite=overwrite)


def _grid(rows: list[TensorRow], kinds: list[str], layers: list[str], relative: bool) -> list[list[float]]:
    """log10 of the value of each cell; several tensors of one kind in one layer count together."""
    above: dict[tuple[str, str], float] = {}
    below: dict[tuple[str, str], float] = {}
    for row in rows:
        cell = _kind(row.name), layer_of(row.name)
        norm = row.norm or 0.0
        above[cell] = above.get(cell, 0.0) + norm**2
        weight = (norm / row.relative) ** 2 if relative and row.relative else 0.0 if relative else row.parameters
        below[cell] = below.get(cell, 0.0) + weight
    return [
        [
            math.log10(above[cell] / below[cell]) / 2 if above.get(cell) and below.get(cell) else math.nan
            for cell in ((kind, layer) for layer in layers)
        ]
        for kind in kinds
    ]


def _bars(axes: Any, found: Inspection, layers: list[str], relative: bool, what: str) -> None:
    by_layer = {row.layer: (row.relative if relative else row.rms) or 0.0 for row in found.layers}
    axes.bar(range(len(layers)), [by_layer[layer] for layer in layers], color="#3b6ea5")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xticks([])
    axes.set_ylabel(what, fontsize=8)
    axes.tick_params(labelsize=7)


def _kind(name: str) -> str:
    """A tensor's name below its layer, with numbers taken out: the same for the same place in each layer."""
    rest = name.removeprefix(layer_of(name)).lstrip(".") or name
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", rest)


def shortened(text: str, most: int = 46) -> str:
    """A label that is not too long: its middle is left out."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
