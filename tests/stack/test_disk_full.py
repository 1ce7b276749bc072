"""A disk that fills up at any moment: exit code 7, the model exactly as before, and nothing left over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.stack.failing import OTHERS, WRITES, failing
from weightlab.stack.journal import BUSY

IN_PLACE = {  # what is on, and the command
    "apply": ([], ("apply", "model", "p.safetensors", "--in-place")),
    "apply a second": (["p"], ("apply", "model", "q.safetensors@0.5", "--in-place")),
    "scale": (["p", "q"], ("scale", "model", "q.safetensors", "2")),
    "remove one": (["p", "q"], ("remove", "model", "p.safetensors")),
    "remove all": (["p", "q"], ("remove", "model", "--all")),
}
ELSEWHERE = {
    "apply to a folder": (["q"], ("apply", "model", "p.safetensors", "-o", "new")),
    "apply to a file": ([], ("apply", "one.safetensors", "q.safetensors", "-o", "new.safetensors")),
    "diff": ([], ("diff", "model", "tuned", "-o", "new.safetensors", "--encode", "dense:bf16")),
    "diff to a folder": ([], ("diff", "model", "tuned", "-o", "new")),
}
Prepare = Callable[[Sequence[str]], None]


def _write(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Two shards with their index, a configuration and a tokenizer."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map, state = {}, {}
    for index in range(2):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        shard = {f"layers.{index}.{name}": torch.randn(20, 30, generator=generator) for name in ("down", "up")}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
        state |= shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}" * 500)
    return state


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `model`, `tuned`, `one.safetensors`, an exact patch `p` and a dense one `q`."""
    monkeypatch.chdir(tmp_path)
    state, tuned = _write(tmp_path / "model", 0), _write(tmp_path / "tuned", 1)
    save_file(state, tmp_path / "one.safetensors")
    wl.diff("model", "tuned", "p.safetensors", include=["layers.0.*"])
    wl.diff("model", state | {n: t + 1 for n, t in tuned.items() if n.endswith("up")}, "q.safetensors", encode="dense")
    return tmp_path


@pytest.fixture
def prepare(place: Path) -> Prepare:
    """Puts patches on and keeps the folder aside, then gives every try the same start."""

    def prepare(on: Sequence[str]) -> None:
        if not (place / "start").exists():
            for name in on:
                wl.apply("model", f"{name}.safetensors", in_place=True)
            shutil.copytree("model", "start")
        shutil.rmtree("model")
        shutil.copytree("start", "model")

    return prepare


@pytest.mark.parametrize("what", [*IN_PLACE, *ELSEWHERE])
def test_the_nth_write_fails(weightlab: Weightlab, place: Path, prepare: Prepare, what: str) -> None:
    on, words = {**IN_PLACE, **ELSEWHERE}[what]
    for number in range(1000):
        prepare(on)
        before = content(place)
        with failing(WRITES, errno.ENOSPC, number) as calls:
            ended = weightlab(*words, "--threads", "1")
        if not calls.failed:
            break
        assert ended.code == 7, ended
        assert "the disk is full" in ended.err and "free some space" in ended.err
        assert content(place) == before
    assert ended.code == 0 and number > 3
    assert content(place) != before


@pytest.mark.parametrize("what", IN_PLACE)
def test_no_write_succeeds_any_more(weightlab: Weightlab, place: Path, prepare: Prepare, what: str) -> None:
    """Once weights are half written there is no room to go back either: then the next command does that."""
    on, words = IN_PLACE[what]
    waiting = 0
    for number in range(1000):
        prepare(on)
        before = content(place)
        with failing(WRITES, errno.ENOSPC, number, ever_after=True) as calls:
            ended = weightlab(*words, "--threads", "1")
            if not calls.failed:
                break
            assert ended.code == 7, ended
            if content(place) != before:
                waiting += 1
                left = content(place)
                assert list(Path("model").glob(f"*{BUSY}")) and list(Path("model/.weightlab").glob("*/intent.json"))
                assert "weightlab status model" in ended.err
                for again in (("status", "model"), ("remove", "model", "--all"), words):
                    assert weightlab(*again).code == 7
                assert content(place) == left
        ended = weightlab("status", "model")
        assert ended.code == 0 and ("undid a change" in ended.out) == bool(calls.failed > 1)
        assert content(place) == before
    assert ended.code == 0 and waiting > 1


@pytest.mark.parametrize("what", IN_PLACE)
def test_any_other_call_fails(weightlab: Weightlab, place: Path, prepare: Prepare, what: str) -> None:
    """A sync, a rename, a link: the model is as before, or, where that came after the commit, as after."""
    on, words = IN_PLACE[what]
    prepare(on)
    assert weightlab(*words).code == 0
    after = content(place)
    seen = set()
    for number in range(1000):
        prepare(on)
        before = content(place)
        with failing(OTHERS, errno.EIO, number) as calls:
            ended = weightlab(*words, "--threads", "1")
        if not calls.failed:
            break
        assert ended.code == 7, ended
        assert weightlab("status", "model").code == 0
        found = content(place)
        assert found in (before, after)
        seen.add(found == after)
    assert seen == {False, True} and number > 20


LIMITED = """
import os, resource, sys
from pathlib import Path
from tests.cli.tools import content
from weightlab_cli.main import run

place, words = Path.cwd(), sys.argv[1:]
before = content(place)
codes = []
for limit in range(0, 40_000, 1000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code = run([*words, "--quiet", "--threads", "2"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    codes.append(code)
    if code == 0:
        break
    assert code == 7, code
    assert content(place) == before, limit
assert code == 0 and len(codes) > 2 and content(place) != before
print(len(codes))
"""


def _child(place: Path, script: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "cli")])}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        check=False,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("what", ["apply", "apply to a folder", "diff"])
def test_the_file_size_limit(place: Path, prepare: Prepare, what: str) -> None:
    """RLIMIT_FSIZE at every height: below the sizes that are known it is refused at once, above them at the write."""
    on, words = {**IN_PLACE, **ELSEWHERE}[what]
    prepare(on)
    done = _child(place, LIMITED, words)
    assert done.returncode == 0, done.stderr
    assert "ulimit" in done.stderr


def test_a_record_over_the_file_size_limit(weightlab: Weightlab, place: Path) -> None:
    """The record of many tiny tensors is larger than the model: no size check sees it coming."""
    tiny = {f"layers.{index}.bias": torch.full((1,), float(index)) for index in range(120)}
    save_file(tiny, "tiny.safetensors")
    wl.diff("tiny.safetensors", {n: t + 1 for n, t in tiny.items()}, "t.safetensors", encode="dense")
    assert Path("tiny.safetensors").stat().st_size < 15_000
    assert weightlab("apply", "tiny.safetensors", "t.safetensors", "--in-place").code == 0
    before = content(place)
    script = "import resource, sys\nfrom weightlab_cli.main import run\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))\nsys.exit(run(sys.argv[1:]))"
    done = _child(place, script, ["scale", "tiny.safetensors", "t.safetensors", "2"])
    assert done.returncode == 7 and "the file size limit is reached" in done.stderr and "intent.json" in done.stderr
    assert content(place) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(path: Path, leave: int) -> None:
    """Makes a file of all the room there is but so much."""
    with pytest.raises(OSError, match="No space left"):
        path.write_bytes(bytes(2**20))
    os.truncate(path, max(0, path.stat().st_size - leave))


@pytest.mark.parametrize("what", ["apply", "apply a second", "remove one", "apply to a folder", "diff to a folder"])
def test_a_small_disk(
    weightlab: Weightlab, place: Path, prepare: Prepare, small_disk: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system with from nothing to enough room left on it; the patches lie on another one."""
    on, words = {**IN_PLACE, **ELSEWHERE}[what]
    prepare(on)
    shutil.copytree("model", small_disk / "model")
    words = tuple(str(place / w) if w.startswith(("p.", "q.", "tuned")) else w for w in words)
    monkeypatch.chdir(small_disk)
    before = content(small_disk)
    failures = 0
    for pages in range(64):
        _fill(Path("filler"), leave=4096 * pages)
        ended = weightlab(*words)
        os.unlink("filler")
        if ended.code == 0:
            break
        assert ended.code == 7, ended
        assert weightlab("status", "model").code == 0
        assert content(small_disk) == before
        failures += 1
    assert ended.code == 0 and failures > 1
    assert content(small_disk) != before
