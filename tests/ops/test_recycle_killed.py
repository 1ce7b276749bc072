"""Recycling that is killed after any operation goes on to the same result, and leaves nothing but differences."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import weightlab as wl
from tests.files.test_temporary import killed_at
from weightlab.errors import NotPatchableError

STEP = int(bool(os.environ.get("WEIGHTLAB_TORTURE"))) or 3
# Adds 4 to what it starts with; quick, as it is run for every kill.
TRAIN = "sh -c 'mkdir $1 && cp tuned$(cat $0/n)/model.safetensors $1/' {start} {out}"


def test_a_kill_after_any_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in range(2):
        for kind, value in (("m", n), ("tuned", n + 4)):
            os.mkdir(f"{kind}{n}")
            save_file({"w": torch.full((3, 4), float(value))}, f"{kind}{n}/model.safetensors")
            Path(f"{kind}{n}/n").write_text(str(n))
    plan = {"bases": ["m0", "m1"], "train": TRAIN, "work": "work", "result": "result", "encode": "dense:fp32"}
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    count, finished = 1, 0
    while killed_at(count, lambda: wl.recycle("plan.yaml")):
        if Path("result").exists():
            finished += 1
            with pytest.raises(NotPatchableError, match="exists already"):
                wl.recycle("plan.yaml")
        else:
            wl.recycle("plan.yaml")
        assert load_file("result/model.safetensors")["w"].tolist() == [[5.0] * 4] * 3
        left = sorted(str(p.relative_to("work")) for p in Path("work").rglob("*") if p.is_file())
        assert left == ["1-tuned/change.safetensors", "plan.json"], count
        assert sorted(p.name for p in Path().iterdir() if p.name.startswith(".")) == []
        assert [str(p) for p in Path("work").rglob("*") if p.name.endswith(".partial")] == [], count
        shutil.rmtree("result")
        shutil.rmtree("work")
        count += STEP if count < 30 else 1  # the result gets its name near the end
    assert count > 30 and finished
