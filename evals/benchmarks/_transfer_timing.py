"""Ten scales of one patch: scored on one loaded model, against ten runs of lm_eval on ten written models."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from weightlab_evals.transfer.begin import MODELS
from weightlab_evals.transfer.study import Study

import weightlab as wl

SCALES = tuple(n / 10 for n in range(1, 11))
QUESTIONS = (50, 250)
_IMPORTS = "import lm_eval.__main__, lm_eval.models.huggingface"


def timing(packages: dict[str, Path], folder: Path, seed: int) -> dict[str, Any]:
    """Seconds, by the number of questions; everything is read from the page cache in both ways.

    Returns:
        {"start": seconds that lm_eval's imports take, "rows": [{"questions", "memory", "written": seconds of the two
        ways, "writing": seconds that the models took to be written, "same": whether all answers count the same}]}
    """
    study = Study(MODELS["smollm2"], seed, packages, folder)
    base, tuned = study.pair()
    start = statistics.median(_seconds(sys.executable, "-c", _IMPORTS) for _ in range(3))
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        patch = Path(work) / "p.safetensors"
        wl.diff(base, tuned, patch, encode="dense:fp32")
        for questions in QUESTIONS:
            asked = ["--tasks", "topics_test", "--include_path", str(study.tasks), "--limit", str(questions)]
            asked += ["--batch_size", "32"]
            scales = ",".join(f"{scale:g}" for scale in SCALES)
            ours = [sys.executable, "-m", "weightlab_cli", "eval", "lm", str(base), "--patch", str(patch)]
            memory = _seconds(*ours, "--scales", scales, "-o", f"{work}/memory-{questions}", *asked, "--device", "cpu")
            written = writing = 0.0
            for scale in SCALES:
                out = Path(work) / f"written-{scale:g}"
                before = time.perf_counter()
                wl.apply(base, wl.open_patch(patch).at(scale), out=out)
                writing += time.perf_counter() - before
                theirs = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={out}"]
                written += _seconds(*theirs, "--output_path", f"{work}/results-{scale:g}", *asked, "--device", "cpu")
                shutil.rmtree(out)
            ways = [f"memory-{questions}/p@{scale:g}" for scale in SCALES], [f"results-{scale:g}" for scale in SCALES]
            ours_said, theirs_said = ([_right(Path(work) / name) for name in names] for names in ways)
            for name in ways[1]:
                shutil.rmtree(Path(work) / name)
            row = {"questions": questions, "memory": memory, "written": written, "writing": writing}
            rows.append({**row, "same": ours_said == theirs_said})
    return {"start": start, "rows": rows}


def _seconds(*command: str) -> float:
    """Of a command from start to end.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    before = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return time.perf_counter() - before


def _right(folder: Path) -> float:
    """The share of right answers in lm_eval's results."""
    (file,) = folder.rglob("results_*.json")
    return float(json.loads(file.read_text())["results"]["topics_test"]["acc,none"])
