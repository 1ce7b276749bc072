"""Several processes on one checkpoint: one writer at a time, readers beside each other, and waiting on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file

import weightlab as wl
from tests.cli.conftest import Weightlab
from tests.cli.tools import content
from tests.patches.tools import state
from weightlab.errors import BusyError
from weightlab.stack import journal
from weightlab.stream.executor import Resources

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from weightlab.files.lock import folder_lock

with folder_lock(Path(sys.argv[1]), exclusive=sys.argv[2] == "writer"):
    print("held", flush=True)
    sys.stdin.readline()
"""
RUN = "import sys; from weightlab_cli.main import run; sys.exit(run(sys.argv[1:]))"


def child(script: str, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    )


@contextmanager
def held(folder: str, by: str) -> Iterator[Callable[[], None]]:
    """Another process holds the folder's lock until the block ends, or what it gives is called."""
    with child(HOLD, folder, by) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "held\n"

        def release() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        try:
            yield release
        finally:
            process.stdin.close()
            assert process.wait() == 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `base`, and three patches for it, of which `p` is on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_file(state(), "base/model.safetensors")
    wl.diff("base", state(1, 0.01), "p.safetensors")
    wl.diff("base", state(2, 0.01), "q.safetensors", encode="dense")
    wl.diff("base", state(3, 0.01), "r.safetensors", encode="sign")
    wl.apply("base", "p.safetensors", in_place=True)
    return tmp_path


CHANGES = [
    ("apply", "base", "q.safetensors", "--in-place"),
    ("scale", "base", "p.safetensors", "0.5"),
    ("remove", "base", "p.safetensors"),
    ("remove", "base", "--all"),
    ("remove", "base", "--forget"),
]
READS = [
    ("apply", "base", "q.safetensors", "-o", "new"),
    ("apply", "base", "q.safetensors", "--in-place", "--dry-run"),
    ("status", "base"),
    ("verify", "base"),
    ("inspect", "base"),
    ("diff", "base", "base"),
]


def test_beside_a_writer_everyone_is_refused_at_once(weightlab: Weightlab, place: Path) -> None:
    before = content(place)
    with held("base", "writer"):
        for words in [*CHANGES, *READS]:
            ended = weightlab(*words)
            assert ended.code == 6, words
            assert "base is in use by another process" in ended.err and "--wait SECONDS" in ended.err
    assert content(place) == before


def test_beside_a_reader_others_may_read_and_no_one_may_write(weightlab: Weightlab, place: Path) -> None:
    before = content(place)
    with held("base", "reader"):
        for words in CHANGES:
            assert weightlab(*words).code == 6, words
        assert content(place) == before
        for words in READS:
            assert weightlab(*words).code == 0, words


@pytest.mark.parametrize("words", [CHANGES[0], CHANGES[1], CHANGES[4], READS[0], READS[2], READS[3]])
def test_waiting(weightlab: Weightlab, place: Path, words: Sequence[str]) -> None:
    with held("base", "writer") as release:
        timer = threading.Timer(0.3, release)
        timer.start()
        assert weightlab(*words, "--wait", "100").code == 0
        timer.join()


def test_waiting_has_an_end(weightlab: Weightlab, place: Path) -> None:
    with held("base", "writer"):
        assert weightlab("apply", "base", "q.safetensors", "--in-place", "--wait", "0.2").code == 6
        assert weightlab("verify", "base", "--wait", "0.2").code == 6


def test_two_changes_at_the_same_time(weightlab: Weightlab, place: Path) -> None:
    """Both are on at the end, whichever came first, with the bits that both have together."""
    wl.apply("base", ["q.safetensors", "r.safetensors"], out="both")
    started = [child(RUN, "apply", "base", f"{p}.safetensors", "--in-place", "--wait", "100", "--json") for p in "qr"]
    for process in started:
        with process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out)["tensors"] == 5
    assert {p.name for p in wl.status("base").patches} == {"p.safetensors", "q.safetensors", "r.safetensors"}
    assert Path("base/model.safetensors").read_bytes() == Path("both/model.safetensors").read_bytes()


def test_in_the_middle_of_a_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shard is set aside and half written, every other is told that it is busy and recovers nothing."""
    met: list[type[BaseException]] = []
    commit = journal.commit

    def look_around(*arguments: object) -> None:
        assert list(Path("base").glob(f"*{journal.BUSY}"))
        before = content(place)
        for call in (
            lambda: wl.status("base"),
            lambda: wl.verify("base"),
            lambda: wl.verify("base/model.safetensors"),  # it has another name just now
            lambda: wl.apply("base", out="new"),
            lambda: wl.diff("base", "base"),
            lambda: wl.scale("base", "p.safetensors", 2.0),
            lambda: wl.remove("base", drop_record=True),
        ):
            with pytest.raises(BusyError) as caught:
                call()
            met.append(caught.type)
        assert content(place) == before
        commit(*arguments)

    with monkeypatch.context() as during:
        during.setattr(journal, "commit", look_around)
        wl.apply("base", "q.safetensors", in_place=True)
    assert met == [BusyError] * 7
    assert wl.status("base").intact


def test_the_lock_ends_with_the_process(weightlab: Weightlab, place: Path) -> None:
    with child(HOLD, "base", "writer") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        assert weightlab("remove", "base", "--all").code == 0


def test_two_models_in_two_folders_do_not_wait(place: Path) -> None:
    (place / "other").mkdir()
    save_file(state(), "other/model.safetensors")
    with held("base", "writer"):
        wl.apply("other", "p.safetensors", in_place=True, resources=Resources(threads=1))
        wl.remove("other", everything=True)
