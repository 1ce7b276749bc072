"""`.weightlab` of version 0.1, at every step of its journal, is read, recovered and changed by today's code.

`golden/make.py` says how the folders were made.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import weightlab as wl

ARCHIVE = Path(__file__).parent / "golden" / "version-0.1.zip"
CHANGES = {"first": ("clean", "p"), "second": ("p", "p+q"), "last": ("p", "clean")}
"""{change: what was on before, and what is on after it}."""
DONE = ("whole", "committed", "one name back", "finished, garbage left", "garbage half collected")
"""The steps at which the change is done: recovery goes forward."""
BEGUN = ("after the intent", "one shard set aside", "shards set aside", "half written", "written")

CASES = sorted({tuple(name.split("/")[:2]) for name in zipfile.ZipFile(ARCHIVE).namelist() if name.count("/") > 1})
CASES = [case for case in CASES if case[0] in CHANGES]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors*")) if not f.name.endswith(".json")}


def test_every_step_is_there() -> None:
    assert len(CASES) == 37
    for change in CHANGES:
        assert {step for c, step in CASES if c == change} >= {*BEGUN, *DONE[:-1], "before the intent"}


@pytest.mark.parametrize(("change", "step"), CASES)
def test_it_is_read_recovered_and_changed(golden: Path, change: str, step: str) -> None:
    model = golden / change / step
    states = {place.name: weights(place) for place in (golden / "states").iterdir()}
    wanted = CHANGES[change][step in DONE]
    set_aside = any(name.endswith("-busy") for name in weights(model))
    assert set_aside == (step in {*BEGUN, "committed", "one name back"} - {"after the intent"})

    status = wl.status(model)
    assert status.intact
    assert bool(status.notes) == (step in {*BEGUN, "committed", "one name back"})
    assert {p.name.split(".")[0] for p in status.patches} == set(wanted.split("+")) - {"clean"}
    assert weights(model) == states[wanted]
    left = {path.name for path in model.rglob("*") if path.name.endswith(".partial")}
    assert not left, "what the killed run left is removed"
    if wanted == "clean":
        assert not (model / ".weightlab").exists()
    wl.verify(model)

    if wanted == "clean":
        wl.apply(model, golden / "p.safetensors", in_place=True)
    if "q" not in wanted:
        wl.apply(model, golden / "q.safetensors", in_place=True)
    assert weights(model) == states["p+q"]
    wl.scale(model, "q.safetensors", 2.0)
    assert weights(model) == states["p+q@2"]
    wl.apply(model, out=golden / "out")
    assert weights(golden / "out") == states["p+q@2"]
    wl.scale(model, "q.safetensors", 1.0)
    wl.remove(model, "p.safetensors")
    assert weights(model) == states["q"]
    wl.remove(model, "q.safetensors")
    assert weights(model) == states["clean"]
    assert not (model / ".weightlab").exists()
    assert sorted(f.name for f in model.iterdir()) == [*sorted(states["clean"]), "model.safetensors.index.json"]


@pytest.mark.parametrize(("change", "step"), [case for case in CASES if case[1] in BEGUN])
def test_a_change_recovers_it_too(golden: Path, change: str, step: str) -> None:
    """Not only `status`: what is on before the change is what the interrupted one is undone to."""
    model = golden / change / step
    states = {place.name: weights(place) for place in (golden / "states").iterdir()}
    before = CHANGES[change][0]
    wl.apply(model, golden / "q.safetensors", in_place=True)
    assert weights(model) == states["q" if before == "clean" else "p+q"]


@pytest.mark.parametrize(("change", "step"), CASES)
def test_it_is_forgotten(golden: Path, change: str, step: str) -> None:
    model = golden / change / step
    before = weights(model)
    wl.remove(model, drop_record=True)
    assert weights(model) == before
    assert not (model / ".weightlab").exists()
