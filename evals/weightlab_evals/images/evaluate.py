"""One classifier, several sets of patches, clean and corrupted images: what is right, as numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import weightlab as wl
from weightlab.errors import UsageError
from weightlab.files.atomic import atomic_file
from weightlab.ops.operands import PatchesLike
from weightlab.runtime.patched import patches_for
from weightlab_evals.images.corruptions import corrupted, corruptions
from weightlab_evals.images.data import Cell, Images
from weightlab_evals.images.metrics import Accuracy, accuracy, corruption_error
from weightlab_evals.images.models import Classifier

SCHEMA = 1
CLEAN: Cell = ("clean", 0)


@dataclass(slots=True)
class Row:
    """One state of the model.

    Attributes:
        patches: what was on: [{id, label, scale}]; nothing for the model itself.
        scale: what the scales of the patches were multiplied by.
        cells: [{corruption, severity, images, correct, accuracy, low, high}].
        mce: mean corruption error relative to the model without patches; None without corruptions.
        predictions: {"corruption severity": the class of each image}.
    """

    patches: list[dict[str, Any]]
    scale: float
    cells: list[dict[str, Any]] = field(default_factory=list)
    mce: float | None = None
    predictions: dict[str, list[int]] = field(default_factory=dict)

    def accuracy(self, corruption: str = "clean", severity: int = 0) -> float:
        """The accuracy of a cell."""
        (found,) = [c for c in self.cells if (c["corruption"], c["severity"]) == (corruption, severity)]
        return float(found["accuracy"])


@dataclass(slots=True)
class Evaluation:
    """All that came out; `rows[0]` is the model without patches."""

    schema_version: int
    model: str
    data: str
    data_digest: str
    images: int
    seed: int
    versions: dict[str, str]
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def evaluate(
    classifier: Classifier,
    images: Images,
    patches: PatchesLike = (),
    *,
    scales: Sequence[float] = (1.0,),
    names: Sequence[str] | None = None,
    severities: Sequence[int] = (5,),
    seed: int = 0,
    batch: int = 64,
    label: str = "",
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    resources: wl.Resources | None = None,
) -> Evaluation:
    """Scores a classifier without patches and, for each of `scales`, with them; they are swapped in memory.

    Args:
        patches: one set, that is on together; each scale multiplies all of its scales.
        names: corruptions; None: all that there are, for data that is corrupted already those that it has.
        severities: 1 to 5.
        seed: of the corruptions' noise.
        cache: where corrupted images are kept.
        progress: called with (images predicted, images in all).
        resources: what putting patches on may use; the network runs on its device too.

    Raises:
        UsageError: corruptions or severities that there are not.
        InputError: labels that do not fit the model.
        MisfitError: patches that do not fit it.
    """
    if resources is not None:
        classifier.module.to(resources.device)
    classifier.places(images)  # labels that do not fit are found before any work
    cells = _cells(images, names, severities)
    opened = patches_for(classifier.module, patches)
    with wl.patched(classifier.module, opened, resources=resources):
        pass  # likewise patches that do not fit
    rows = [Row([], 0.0)] + ([Row([_patch(p, s) for p in opened], s) for s in scales] if opened else [])
    done, total = 0, len(rows) * len(cells) * len(images)

    def after(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for cell in cells:  # the outer loop: a set of images is made and read once
        shown = _shown(images, cell, seed, cache)
        labels = classifier.places(shown)
        for row in rows:
            on = [p.at(p.exact_scale * row.scale) for p in opened] if row.patches else []
            with wl.patched(classifier.module, on, resources=resources):
                found = classifier.predict(shown, batch, after).numpy()
            name, severity = cell
            score: Accuracy = accuracy(int((found == labels).sum()), len(labels))
            row.cells.append({"corruption": name, "severity": severity, **dataclasses.asdict(score)})
            row.predictions[f"{name} {severity}"] = found.tolist()
    for row in rows:
        row.mce = _mce(row, rows[0])
    return Evaluation(SCHEMA, label, images.name, images.digest(), len(images), seed, _versions(), rows)


def _cells(images: Images, names: Sequence[str] | None, severities: Sequence[int]) -> list[Cell]:
    known = list(dict.fromkeys(name for name, _ in images.cells)) if images.cells else None
    chosen = list(names) if names is not None else corruptions() if known is None else known
    there = corruptions() if known is None and chosen else known or []
    wrong = [n for n in chosen if n not in there] + [str(s) for s in severities if s not in range(1, 6)]
    wrong += [f"{n} {s}" for n in chosen for s in severities if images.cells and (n, s) not in images.cells]
    if wrong:
        raise UsageError("no such corruptions or severities", f"severities 1 to 5 of: {', '.join(there)}", wrong)
    return [*([] if images.cells else [CLEAN]), *((n, s) for n in chosen for s in severities)]


def _shown(images: Images, cell: Cell, seed: int, cache: Path | None) -> Images:
    if cell == CLEAN:
        return images
    return images.cells[cell] if images.cells else corrupted(images, *cell, seed, cache)


def _patch(patch: wl.Patch, factor: float) -> dict[str, Any]:
    return {"id": patch.id, "label": patch.label, "scale": patch.exact_scale * factor}


def _mce(row: Row, baseline: Row) -> float | None:
    def errors(of: Row) -> Mapping[str, Mapping[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for cell in of.cells:
            if cell["severity"]:
                found.setdefault(cell["corruption"], {})[cell["severity"]] = 1 - cell["accuracy"]
        return found

    mine, other = errors(row), errors(baseline)
    value = corruption_error(mine, other) if mine else None
    return value if value is None or np.isfinite(value) else None


def _versions() -> dict[str, str]:
    found = {}
    for name in ("weightlab", "torch", "numpy", "transformers", "corrupt-tta"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an extra that was not needed
            continue
    return found
