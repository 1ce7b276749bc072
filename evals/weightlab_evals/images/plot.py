"""Accuracy against the scale of the patches, as a picture."""

from __future__ import annotations

from pathlib import Path

from weightlab.errors import InputError
from weightlab.files.atomic import atomic_file
from weightlab.ops.plot import check_picture, shortened
from weightlab_evals.images.evaluate import Evaluation


def plot_scales(found: Evaluation, path: Path) -> None:
    """Draws a line a corruption (the mean of its severities), and one for clean images; scale 0 is the model itself.

    Raises:
        InputError: there are no scales to draw.
        UsageError, NotPatchableError: see `check_picture`.
    """
    check_picture(path)
    if len(found.rows) < 2:
        raise InputError("no scales to draw", "give patches, and --scales")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(found.rows, key=lambda row: row.scale)
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(cell["corruption"] for cell in rows[0].cells):
        shares = [[c["accuracy"] for c in row.cells if c["corruption"] == name] for row in rows]
        style = {"color": "black", "linewidth": 2.0} if name == "clean" else {"linewidth": 1.0}
        axes.plot([r.scale for r in rows], [sum(s) / len(s) for s in shares], marker=".", label=name, **style)
    axes.set_xlabel("scale of " + shortened(", ".join(p["label"] for p in found.rows[1].patches), 60))
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=6, ncols=2)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
