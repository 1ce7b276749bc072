"""Runs a command and says what it cost: wall time, peak memory of its process tree, bytes moved.

Linux only: the numbers come from /proc. Also what the machine is, the environments of the tools compared
with, and medians, ratios and the table of what came out.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

_MARKERS = "<!-- benchmark:engine -->", "<!-- /benchmark:engine -->"
_POLL_SECONDS = 0.02
_TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Cost:
    """What one run of a command cost.

    Attributes:
        seconds: Wall time from start to exit.
        sync_seconds: How long it took after that to bring what was written to the disk.
        peak_bytes: Peak resident memory; file pages that the processes map count in it.
        peak_anonymous_bytes: The same without mapped file pages; polled, so a short peak can escape it.
        read_calls_bytes, written_calls_bytes: What went through read and write calls, cached or not.
        read_disk_bytes, written_disk_bytes: What came from, and is bound for, the disk (dirtied pages).
        processor_seconds: User and system time of the tree.
        exit_code, output: How it ended, and the end of what it printed.
    """

    seconds: float
    sync_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    read_calls_bytes: int
    written_calls_bytes: int
    read_disk_bytes: int
    written_disk_bytes: int
    processor_seconds: float
    exit_code: int
    output: str

    @property
    def written_bytes(self) -> int:
        """The larger count: mapped writes escape the calls, and a clone of extents dirties no page."""
        return max(self.written_calls_bytes, self.written_disk_bytes)


class _Sampler(threading.Thread):
    """Polls the memory of a process and of all that it starts."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.peak_anonymous = 0
        self._process = process
        self._done = threading.Event()

    def run(self) -> None:
        while True:
            self._sample()
            if self._done.wait(_POLL_SECONDS):
                return

    def stop(self) -> None:
        self._done.set()
        self.join()

    def _sample(self) -> None:
        resident = anonymous = 0
        for process in _tree(self._process):
            status = _fields(f"/proc/{process}/status")
            resident += status.get("VmRSS", 0)
            anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
            # The high-water mark is the kernel's own, so a peak between two polls is not lost.
            self.peak = max(self.peak, status.get("VmHWM", 0) * 1024)
        self.peak = max(self.peak, resident * 1024)
        self.peak_anonymous = max(self.peak_anonymous, anonymous * 1024)


def measure(command: Sequence[str], written_to: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Runs `command` to its end; `written_to` names a path on the file system that is synced afterwards.

    The bytes are read off the process after it has ended and before it is reaped: at that moment the
    kernel's counts are complete and hold those of the children that it has waited for.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
        sampler = _Sampler(process.pid)
        sampler.start()
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            seconds = time.perf_counter() - start
            sampler.stop()
        transferred = _fields(f"/proc/{process.pid}/io")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, so Popen must not look for it
        output.seek(0)
        text = output.read().decode(errors="replace")
    start = time.perf_counter()
    sync(written_to)
    sync_seconds = time.perf_counter() - start
    return Cost(
        seconds=seconds,
        sync_seconds=sync_seconds,
        peak_bytes=max(sampler.peak, _reported_peak(usage)),
        peak_anonymous_bytes=sampler.peak_anonymous,
        read_calls_bytes=transferred.get("rchar", 0),
        written_calls_bytes=transferred.get("wchar", 0),
        read_disk_bytes=transferred.get("read_bytes", 0),
        written_disk_bytes=transferred.get("write_bytes", 0),
        processor_seconds=usage.ru_utime + usage.ru_stime,
        exit_code=process.returncode,
        output=text[-_TAIL_CHARACTERS:],
    )


def sync(path: Path) -> None:
    """Brings all that is dirty on the file system of `path` to the disk."""
    while not path.exists():
        path = path.parent
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Python has no call for it; os.sync would also wait for every other disk.
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(path))
    finally:
        os.close(descriptor)


def warm(paths: Iterable[Path]) -> None:
    """Reads files, and the files of folders, once, so that they lie in the page cache."""
    buffer = bytearray(2**22)
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb", buffering=0) as opened:
                    while opened.readinto(buffer):
                        pass


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def machine(work: Path) -> dict[str, str | int]:
    """What the numbers were taken on."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [str(work.resolve()), *map(str, work.resolve().parents)]
    holding = [(len(mount[1]), position, mount[2]) for position, mount in enumerate(mounts) if mount[1] in above]
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _fields("/proc/meminfo").get("MemTotal", 0) * 1024,
        "kernel": platform.release(),
        "filesystem": max(holding)[2] if holding else "unknown",
    }


def cache_folder() -> Path:
    """$WEIGHTLAB_CACHE, else ~/.cache/weightlab; the part of it that is for benchmarks."""
    return Path(os.environ.get("WEIGHTLAB_CACHE") or Path.home() / ".cache" / "weightlab").expanduser() / "benchmarks"


def ensure_environment(name: str, steps: Sequence[Sequence[str]]) -> Path:
    """The bin folder of a virtual environment in the cache; made if need be, one `pip install` a step.

    Raises:
        subprocess.CalledProcessError: If an installation fails; nothing is left of the environment then.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / "environments" / f"{name}-{version}"
    complete = folder / "installed.json"  # written last: an interrupted installation is begun again
    if not (complete.exists() and json.loads(complete.read_text()) == [list(step) for step in steps]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            for step in steps:
                subprocess.run(
                    [str(folder / "bin" / "pip"), "install", "--quiet", *step], check=True, stdout=sys.stderr
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        complete.write_text(json.dumps([list(step) for step in steps]))
    return folder / "bin"


def medians(repetitions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each number of each command, over the runs that succeeded; of some the extremes too."""
    found: dict[str, dict[str, float]] = {}
    for label, every in repetitions.items():
        runs = [run for run in every if run["exit_code"] == 0]
        if not runs:
            continue
        numbers = [name for name, value in runs[0].items() if isinstance(value, (int, float))]
        found[label] = {name: statistics.median(run[name] for run in runs) for name in numbers}
        found[label]["runs"] = len(runs)
        found[label]["synced_seconds"] = statistics.median(run["seconds"] + run["sync_seconds"] for run in runs)
        for name in ("seconds", "peak_bytes"):
            values = [run[name] for run in runs]
            found[label] |= {f"least_{name}": min(values), f"largest_{name}": max(values)}
    return found


def ratios(middle: Mapping[str, Mapping[str, float]], touched: int) -> list[dict[str, Any]]:
    """The ratios that are claimed, with their targets; None where something needed was not measured."""
    rivals = [label for label in middle if label.startswith("mergekit_")]
    rival = min(rivals, key=lambda label: middle[label]["seconds"], default="mergekit")
    leanest = min(rivals, key=lambda label: middle[label]["peak_bytes"], default="mergekit")
    fastest, lean = middle.get(rival, {}), middle.get(leanest, {})
    rival, leanest = (name.replace("_", " ") for name in (rival, leanest))
    names = (
        "apply_out_dense",
        "apply_out_dense_scaled",
        "apply_in_place",
        "remove_in_place",
        "status",
        "copy",
    )
    out, scaled, on, off, status, copied = (middle.get(name, {}) for name in names)
    anonymous = "peak_anonymous_bytes"
    rows: list[tuple[str, float | None, float | None, float | None]] = [
        (f"apply --out / {rival}: wall time", out.get("seconds"), fastest.get("seconds"), 0.30),
        (
            f"apply --out / {rival}: wall time, each with its sync",
            out.get("synced_seconds"),
            fastest.get("synced_seconds"),
            None,
        ),
        (
            f"apply --out / {rival}: wall time, each less its start-up",
            _less(out, status),
            _less(fastest, middle.get("start_mergekit", {})),
            None,
        ),
        (f"apply --out / {rival}: peak memory", out.get("peak_bytes"), fastest.get("peak_bytes"), 0.17),
        (
            f"apply --out / {leanest} (the leanest): peak memory",
            out.get("peak_bytes"),
            lean.get("peak_bytes"),
            None,
        ),
        (
            f"apply --out / {rival}: peak without mapped files",
            out.get(anonymous),
            fastest.get(anonymous),
            None,
        ),
        (
            "apply --out at the larger size / at the size: peak memory",
            scaled.get("peak_bytes"),
            out.get("peak_bytes"),
            None,
        ),
    ]
    for name, cost, written, time_ in (("apply", on, 2.3, 0.35), ("remove", off, None, None)):
        spent = _less(cost, status)
        rows += [
            (f"{name} --in-place: bytes written / touched", cost.get("written_bytes"), touched, written),
            (
                f"{name} --in-place less start-up / cp -r and sync: time",
                spent,
                copied.get("synced_seconds"),
                time_,
            ),
        ]
    found: list[dict[str, Any]] = []
    for title, over, under, target in rows:
        value = over / under if over is not None and under else None
        met = value <= target if value is not None and target is not None else None
        found.append({"name": title, "value": value, "target": target, "met": met})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Everything a reader of the README should see, as Markdown."""
    model, where, versions = result["model"], result["machine"], result["versions"]
    lines = [
        f"{model['parameters'] / 1e9:.2f} billion parameters in bf16, {model['bytes'] / 1e9:.2f} GB, "
        f"{model['shards']} shards; tuned: {model['share_of_values_changed']:.0%} of the values changed, "
        f"relative change {model['relative_change']:.1e}. Medians of {result['parameters']['repeat']} "
        f"interleaved runs, inputs in the page cache, on {where['processor']}, {where['cores']} cores, "
        f"{where['memory_bytes'] / 2**30:.0f} GiB, Linux {where['kernel']}, {where['filesystem']}; "
        f"Python {versions['python']}, torch {versions['torch']}, mergekit {versions['mergekit']}, "
        f"reminis {versions['reminis']}.",
        "",
        "| | seconds | with sync | peak GB | without mapped files | written GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, cost in result["medians"].items():
        if not label.startswith("prepare_"):
            failed = len(result["repetitions"][label]) - int(cost["runs"])
            name = label.replace("_", " ") + (f" ({failed} more runs failed)" if failed else "")
            lines.append(
                f"| {name} | {cost['seconds']:.2f} | {cost['synced_seconds']:.2f} "
                f"| {cost['peak_bytes'] / 1e9:.2f} | {cost['peak_anonymous_bytes'] / 1e9:.2f} "
                f"| {cost['written_bytes'] / 1e9:.3f} |"
            )
    known = [ratio for ratio in result["ratios"] if ratio["value"] is not None]
    if known:
        lines += ["", "| | came out | target |", "|---|---:|---:|"]
    for ratio in known:
        target = "" if ratio["target"] is None else f"≤ {ratio['target']:.2f}"
        missed = " (missed)" if ratio["met"] is False else ""
        lines.append(f"| {ratio['name']} | {ratio['value']:.3f}{missed} | {target} |")
    if result["sizes"]:
        lines += ["", "| | GB |", "|---|---:|"]
        lines += [f"| {name} | {count / 1e9:.3f} |" for name, count in result["sizes"].items()]
    facts = [f"- {name}: {_told(found)}" for name, found in result["checks"].items() if isinstance(found, list)]
    facts += [f"- {' '.join(note.split())}" for note in result["notes"]]
    return "\n".join([*lines, *([""] if facts else []), *facts])


def replace_between_markers(path: Path, text: str) -> str:
    """The content of the file with `text` between the markers; the file stays as it is.

    Raises:
        click.UsageError: If the markers are not there once each, in order.
    """
    document = path.read_text()
    begin, end = _MARKERS
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise click.UsageError(f"{path} needs one {begin} and, after it, one {end}")
    return f"{document.partition(begin)[0]}{begin}\n{text}\n{end}{document.partition(end)[2]}"


def _told(found: Sequence[Any]) -> str:
    """The outcomes of one check, each told once."""
    told = []
    for outcome in found:
        if isinstance(outcome, Mapping):
            text = f"{outcome['differing_values']:,} of {outcome['values']:,} values differ"
            if outcome["names_in_one_only"]:
                text += f", {outcome['names_in_one_only']} tensors in one of them only"
        else:
            text = "yes" if outcome else "no"
        told.append(text)
    return "; ".join(dict.fromkeys(told)) + f" ({len(told)} checked)"


def _less(cost: Mapping[str, float], start_up: Mapping[str, float]) -> float | None:
    """Seconds without those that starting up takes."""
    return cost["seconds"] - start_up["seconds"] if cost and start_up else None


def _reported_peak(usage: resource.struct_rusage) -> int:
    """The kernel's peak for the largest process of the tree, or 0 where it may be our own.

    Between fork and exec the child is a copy of this process, and that counts; a smaller value says nothing.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage.ru_maxrss * 1024 if usage.ru_maxrss > own else 0


def _tree(process: int) -> list[int]:
    """The process and its living descendants; it alone where the kernel keeps no list of children."""
    found = [process]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        except OSError:
            continue  # it has ended
    return found


def _fields(path: str) -> dict[str, int]:
    """The lines `name: number [unit]` of a file of /proc; empty when the process has gone."""
    found = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            found[name] = int(number[0])
    return found
