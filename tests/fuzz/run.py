"""Many mutated inputs in several processes; prints counts by kind, and each finding with what reproduces it.

python -m tests.fuzz.run 100000
python -m tests.fuzz.run --kind LoRA --seed 1234     (one input, with its traceback)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter, defaultdict
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.fuzz.kinds import kinds, of_seed
from tests.fuzz.trial import SECONDS, Fuzzer, Outcome, quiet

_STUCK = 6 * SECONDS
"""What no signal ends is killed."""


def _work(first: int, last: int, step: int, only: str | None, current: Any, sent: Connection) -> None:
    quiet()
    fuzzer = Fuzzer()
    batch: list[Outcome] = []
    try:
        for seed in range(first, last, step):
            kind = kinds()[only] if only else of_seed(seed)
            current[0], current[1] = seed, int(time.time())
            outcome = fuzzer.trial(kind, seed)
            batch.append(outcome)
            if len(batch) == 50 or outcome.finding:
                sent.send(batch)
                batch = []
        sent.send(batch)
        sent.send(None)
    finally:
        fuzzer.close()


class _Worker:
    """A process and the seeds that it still has; a new one goes on behind an input that ended the last."""

    def __init__(self, first: int, last: int, step: int, only: str | None) -> None:
        self._range, self._only = (first, last, step), only
        self.ended = False
        self._start(first)

    def _start(self, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._current = context.Array("q", [first, int(time.time()) + 60], lock=False)
        self.received, sent = context.Pipe(duplex=False)
        _, last, step = self._range
        self._process = context.Process(target=_work, args=(first, last, step, self._only, self._current, sent))
        self._process.start()
        sent.close()

    def take(self) -> list[Outcome]:
        """What has come; for a process that died, or is stuck, a finding."""
        try:
            if self.received.poll(0):
                batch = self.received.recv()
                self.ended = batch is None
                return batch or []
            if time.time() - self._current[1] < _STUCK:
                return []
            self._process.kill()
            how = "stuck, and killed"
        except EOFError:
            how = "the process died"
        self._process.join()
        how += f" (exit code {self._process.exitcode})"
        seed, (_, last, step) = int(self._current[0]), self._range
        name = self._only or of_seed(seed).name
        if seed + step < last:
            self._start(seed + step)
        else:
            self.ended = True
        return [Outcome(name, seed, "?", "", how)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=int, nargs="?", default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kind", help="only this one")
    parser.add_argument("--seed", type=int, help="only this input, here, with its traceback")
    asked = parser.parse_args()
    if asked.seed is not None:
        return _one(asked.kind, asked.seed)
    began = time.monotonic()
    last = asked.first + asked.inputs
    workers = [_Worker(asked.first + n, last, asked.workers, asked.kind) for n in range(asked.workers)]
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    findings: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    slowest: dict[str, float] = defaultdict(float)
    while active := [worker for worker in workers if not worker.ended]:
        wait([worker.received for worker in active], timeout=5)
        for outcome in [outcome for worker in active for outcome in worker.take()]:
            outcomes[outcome.kind][outcome.result or "FINDING"] += 1
            slowest[outcome.kind] = max(slowest[outcome.kind], outcome.seconds)
            if outcome.finding:
                same = findings[outcome.kind, outcome.finding.partition(": ")[0]]
                same.append(outcome)
                if len(same) == 1:
                    print(f"FINDING --kind {outcome.kind!r} --seed {outcome.seed}: {outcome.finding}", flush=True)
    for name, counts in sorted(outcomes.items()):
        told = ", ".join(f"{result} {count:,}" for result, count in counts.most_common())
        print(f"{name}: {counts.total():,} inputs, slowest {slowest[name]:.1f} s: {told}")
    total = sum(counts.total() for counts in outcomes.values())
    found = sum(len(same) for same in findings.values())
    print(f"{total:,} inputs, {found:,} findings of {len(findings)} kinds, {time.monotonic() - began:.0f} s")
    for (name, place), same in sorted(findings.items(), key=lambda item: -len(item[1])):
        seeds = " ".join(str(outcome.seed) for outcome in same[:4])
        print(f"  {len(same):5}  {name}: {place}; seeds {seeds}; {same[0].reader}: {same[0].finding}")
    return bool(findings) or total != asked.inputs


def _one(name: str | None, seed: int) -> int:
    quiet()
    kind = kinds()[name] if name else of_seed(seed)
    fuzzer = Fuzzer()
    try:
        work, reader = fuzzer.spoil(kind, seed)
        print(f"{kind.name}, seed {seed}: {reader} of {work}")
        print(kind.readers[reader](work))
    finally:
        fuzzer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
