"""One mutated input: made from a seed, read as a command would read it, within bounds of time and memory."""

from __future__ import annotations

import logging
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import weightlab as wl
from tests.fuzz.kinds import Kind

SECONDS = 10
MEMORY = 2**30
"""By how much the process may grow for one input."""


class TooLong(BaseException):
    """Past the bound of time; no handler of errors takes it for one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an input.

    Attributes:
        result: "accepted", the class of weightlab's error, or "" for a finding.
        finding: any other exception with its last frame in weightlab, or the bound that was passed.
    """

    kind: str
    seed: int
    reader: str
    result: str
    finding: str = ""
    seconds: float = 0.0


class Fuzzer:
    """Tries inputs; the valid ones are made once each, in a temporary folder that goes with this."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="weightlab-fuzz-")
        self._made: dict[str, Path] = {}
        self._spoilable: dict[str, list[tuple[Path, str]]] = {}

    def close(self) -> None:
        self._home.cleanup()

    def _valid(self, kind: Kind) -> Path:
        if kind.name not in self._made:
            folder = Path(self._home.name) / "valid" / kind.name
            folder.mkdir(parents=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries that make models and adapters
                kind.make(folder)
            found = [(p, g) for g in kind.spoiled for p in sorted(folder.glob(g)) if p.is_file()]
            unused = [glob for glob in kind.spoiled if glob not in {g for _, g in found}]
            if unused:
                raise AssertionError(f"{kind.name}: no file is {unused}")
            self._made[kind.name], self._spoilable[kind.name] = folder, found
            for reader in kind.readers.values():  # what is imported for the first time takes its time
                with suppress(wl.WeightlabError), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(self._copy(kind))
        return self._made[kind.name]

    def accepts_valid(self, kind: Kind) -> dict[str, str]:
        """What each reader makes of the valid input."""
        return {name: self._read(kind, name, self._copy(kind), 0).result for name in kind.readers}

    def _copy(self, kind: Kind) -> Path:
        valid = self._valid(kind)
        work = Path(self._home.name) / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(valid, work, symlinks=True)
        return work

    def spoil(self, kind: Kind, seed: int) -> tuple[Path, str]:
        """Makes the input of that seed: its folder, and the reader that it is for."""
        random = Random(f"{kind.name} {seed}")
        work = self._copy(kind)
        valid = self._made[kind.name]
        path, glob = random.choice(self._spoilable[kind.name])
        changed = kind.spoiled[glob](path.read_bytes(), random)
        (work / path.relative_to(valid)).write_bytes(changed)
        return work, random.choice(sorted(kind.readers))

    def trial(self, kind: Kind, seed: int) -> Outcome:
        work, reader = self.spoil(kind, seed)
        return self._read(kind, reader, work, seed)

    def _read(self, kind: Kind, reader: str, work: Path, seed: int) -> Outcome:
        before, peak = _resident(), _peak()
        started = time.monotonic()
        result, finding = "accepted", ""
        try:
            with _bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.readers[reader](work)
        except wl.WeightlabError as error:
            result = type(error).__name__
            if not error.message or not str(error).replace("\n", "").replace("\t", "").isprintable():
                result, finding = "", f"{type(error).__name__} with a message that cannot be shown"
        except TooLong as late:
            result, finding = "", f"more than {SECONDS} s at {_place(late)}"
        except BaseException as error:  # panics of libraries written in Rust are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            result, finding = "", f"{type(error).__name__} at {_place(error)}: {' '.join(str(error).split())[:120]}"
        if _peak() > peak and _peak() - before > MEMORY:
            result, finding = "", f"{(_peak() - before) / 2**20:.0f} MB more memory"
        return Outcome(kind.name, seed, reader, result, finding, time.monotonic() - started)


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends what takes too long; memory is bounded too, well above what is a finding, so that no machine is filled."""

    def late(number: int, frame: object) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = _virtual() + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room if hard == resource.RLIM_INFINITY else min(room, hard), hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _pages(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _resident() -> int:
    return _pages(1)


def _virtual() -> int:
    return _pages(0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """The last frame of weightlab in a traceback."""
    root = str(Path(wl.__file__).parents[1])
    frames = [
        f"{Path(frame.filename).relative_to(root)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(root) and "/tests/" not in frame.filename
    ]
    return frames[-1] if frames else "the fuzzer"


def quiet() -> None:
    """No progress bars, no log: of a hundred thousand inputs no one reads them."""
    logging.disable(logging.CRITICAL)
    with suppress(ImportError):
        import transformers

        transformers.utils.logging.disable_progress_bar()
