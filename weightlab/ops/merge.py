"""Several fine-tunes of one base as one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from weightlab.errors import UsageError
from weightlab.files.digest import fingerprint
from weightlab.methods import METHODS, Deltas, Settings
from weightlab.ops.alike import clean_source, require_shapes, shared_names, under_target_names
from weightlab.ops.naming import told, under_names_of
from weightlab.ops.new_checkpoint import write_out
from weightlab.ops.operands import PathLike, adapters_beside, model_path
from weightlab.ops.outcome import Outcome
from weightlab.patches.compute import digest_tensors
from weightlab.patches.fit import StackEntry
from weightlab.patches.virtual import delta_patch
from weightlab.sources.virtual.computed import ComputedSource
from weightlab.sources.virtual.difference import DifferenceSource
from weightlab.stack.transaction import ChangeOptions
from weightlab.stream.executor import Resources
from weightlab.tensors.arithmetic import round_scale
from weightlab.tensors.naming import Renames
from weightlab.tensors.select import patterns


def merge(
    base: PathLike,
    tuned: Sequence[PathLike],
    out: PathLike,
    *,
    method: str = "task_arithmetic",
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    renames: Renames | None = None,
    allow_nonfinite: bool = False,
    wait: float = 0.0,
    dry_run: bool = False,
    resources: Resources | None = None,
) -> Outcome:
    """Writes base + what a method makes of the differences (tuned − base), rounded once, in the base's dtypes.

    Everything beside the weights is the base's; so are tensors of integers. No difference is stored: each is computed
    while it is read.

    Args:
        out: a new folder, or `NAME.safetensors` for a model of one file.
        method: a name in `weightlab.methods.METHODS`.
        weights: one for each tuned model; None: all 1.
        parameters: the method's, by name: a value, or a list with one for each tuned model.

        include, exclude: globs over the base's tensor names; the others stay the base's, and are not compared.
        renames: {old: new} from the tuned models' tensor names to the base's, see `rename`; "auto" infers it.

    Raises:
        UsageError: no model, or parameters that make no sense.
        NamesMismatchError: lists every tensor that one of the models lacks, has beyond the base, or has in another
            shape; MisfitError: weights that are codes of a quantised checkpoint.
    """
    if not tuned:
        raise UsageError("nothing to merge", "give one or more tuned models")
    if weights is not None and len(weights) != len(tuned):
        raise UsageError(f"{len(weights)} weights for {len(tuned)} models", "give one for each")
    merging = METHODS.get(method)
    settings = Settings(method, merging.parameters, parameters, len(tuned))
    options = ChangeOptions("refuse", allow_nonfinite, wait, dry_run, resources or Resources())
    scales = [round_scale(w) for w in weights or [1.0] * len(tuned)]
    with ExitStack() as stack:
        *given, start = [clean_source(stack, model_path(m), wait, options.resources) for m in (*tuned, base)]
        tunes, taken = under_names_of(start, given, renames)
        models = [*tunes, start]
        names = shared_names(models, options.resources, None, patterns(include), patterns(exclude))
        require_shapes(models, names)
        target = models.pop()
        others = [under_target_names(source, names, index) for index, source in enumerate(models)]
        sources = [DifferenceSource(target, other, list(names)) for other in others]
        ids = [fingerprint(digest_tensors(other, names, options.resources)) for other in others]
        order = sorted(range(len(tuned)), key=lambda i: (ids[i], scales[i]))
        deltas = Deltas(
            [sources[i] for i in order],
            [ids[i] for i in order],
            [scales[i] for i in order],
            {n: max((s.specs[n] for s in sources), key=lambda spec: spec.type.bits) for n in names},
            options.resources,
        )
        merged = ComputedSource(method, deltas.specs, merging.begin(deltas, settings.ordered(order)))
        specs = {n: target.specs[n] for n in names}
        entry = StackEntry(delta_patch(merged, specs, specs), 1.0)
        done = write_out(base, Path(out), lambda on: [*on, (method, entry)], None, options)
        done.notes += told(taken if renames == "auto" else {})
        done.notes += adapters_beside(*tuned)
        return done
