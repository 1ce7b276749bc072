"""Many stacks of patches on one loaded model: from Python, and through lm_eval's own command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightlab.errors import UsageError
from weightlab.ops.operands import PatchesLike, parse_patch
from weightlab_evals.lm.model import CLEAN, WeightlabLM
from weightlab_evals.lm.tasks import index_kept
from weightlab_evals.lm.twin import folder_is_twin


def evaluate(model: WeightlabLM, stacks: Sequence[PatchesLike], **options: Any) -> list[dict[str, Any]]:
    """Scores a loaded model with each stack of patches on it; an empty one is the clean model.

    Args:
        options: of `lm_eval.simple_evaluate`: tasks, limit, num_fewshot and so on. `use_cache` is a beginning of file
            names here: there is one file a stack.

    Returns:
        one result a stack, in their order; the stack is under `config.weightlab`.
    """
    import lm_eval

    cache = options.pop("use_cache", None)
    found: list[dict[str, Any]] = []
    with index_kept():
        for patches in stacks:
            with model.stack(patches):
                own = None if cache is None else f"{cache}-{model.stack_digest}"
                results = lm_eval.simple_evaluate(model=model, use_cache=own, **options)
            found.append(results)
    return found


def run_cli(
    model: str, stacks: Sequence[Sequence[str]], arguments: Sequence[str], out: Path | None, cache: str | None
) -> list[str]:
    """Runs lm_eval's command line once a stack, on one loaded model.

    Args:
        arguments: any of `lm_eval run`, but for the model, the output path and the cache.
        out: gets one folder a stack, with lm_eval's own files in it.
        cache: the beginning of the names of lm_eval's caches of answers, one a stack.

    Returns:
        the names of the stacks.

    Raises:
        UsageError: lm_eval does not take these arguments.
    """
    twin = folder_is_twin(model)
    if twin and any(stacks):
        raise UsageError(f"{model} is a twin, which has no patches on", "score it without --patch")
    if "," in model:
        raise UsageError(f"{model}: lm_eval splits its arguments at commas", "give a path without one")
    from lm_eval.__main__ import cli_evaluate

    kind = "weightlab-twin" if twin else "weightlab"
    words = ["lm-eval", "run", "--model", kind, "--model_args", f"pretrained={model}", *arguments]
    names: list[str] = []
    with WeightlabLM.kept() as kept, index_kept():
        for patches in stacks:
            kept.patches = patches
            name = folder_name([_label(patch) for patch in patches])
            own = [] if out is None else ["--output_path", str(out / name)]
            own += [] if cache is None else ["--use_cache", f"{cache}-{name}"]
            before, sys.argv = sys.argv, [*words, *own]
            try:
                cli_evaluate()
            except SystemExit as error:
                if error.code:
                    raise UsageError("lm_eval does not take these arguments", "see `lm_eval run --help`") from error
            finally:
                sys.argv = before
                kept.leave()
            names.append(name)
    return names


def folder_name(labels: Sequence[str]) -> str:
    """A stack's name as a folder's."""
    return re.sub(r"[^\w.@+-]", "_", "+".join(labels)) or CLEAN


def _label(operand: str) -> str:
    path, scale = parse_patch(operand)
    return f"{Path(path).resolve().name.removesuffix('.safetensors')}@{1.0 if scale is None else scale:g}"
