"""A picture of a comparison: the cosines as a heat map, and where in depth each operand lies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from weightlab.files.atomic import atomic_file
from weightlab.ops.plot import check_picture, shortened
from weightlab.ops.similarity import Comparison

_MOST_LABELS = 40


def plot_comparison(found: Comparison, path: Path, *, overwrite: bool = False) -> None:
    """Draws it as a PNG.

    Raises:
        UsageError, NotPatchableError: see `check_picture`.
    """
    check_picture(path, overwrite=overwrite)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, layers = len(found.labels), [row.layer for row in found.layers]
    side = 2.6 + 0.34 * count
    figure = Figure(figsize=(side + 4.5 + min(12.0, 0.16 * len(layers)), max(4.0, side)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[side, 4.5 + min(12.0, 0.16 * len(layers))])
    _heat_map(figure, left, found)
    for index, label in enumerate(found.labels):
        right.plot([row.norms[index] for row in found.layers], marker=".", linewidth=1, label=shortened(label, 24))
    step = max(1, math.ceil(len(layers) / _MOST_LABELS))
    shown = range(0, len(layers), step)
    right.set_xticks(list(shown), [shortened(layers[i], 30) for i in shown], rotation=90, fontsize=7)
    right.set_ylabel("norm of the change" if found.compared == "changes" else "norm", fontsize=8)
    right.set_ylim(bottom=0)
    right.tick_params(axis="y", labelsize=7)
    right.legend(fontsize=7)
    with atomic_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _heat_map(figure: Any, axes: Any, found: Comparison) -> None:
    labels = [shortened(label, 24) for label in found.labels]
    image = axes.imshow(found.cosines, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    if len(labels) <= 20:
        for row, cosines in enumerate(found.cosines):
            for column, value in enumerate(cosines):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6)
    figure.colorbar(image, ax=axes, label="cosine", fraction=0.05)
