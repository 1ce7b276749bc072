"""Threads, buffers, the budget; errors and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from weightlab.errors import UsageError
from weightlab.files.digest import Turns
from weightlab.stream.executor import Progress, Resources, Room, run
from weightlab.tensors.workspace import Workspace


def test_every_task_once_and_begun_in_order() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def tasks() -> object:
        for index in range(200):
            with lock:
                begun.append(index)
            yield index

    done: list[int] = []
    run(tasks(), lambda task, _: done.append(task), Resources(threads=4))  # type: ignore[arg-type]
    assert begun == list(range(200)) and sorted(done) == begun


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_error_is_raised_and_the_others_stop(threads: int) -> None:
    turns, done = Turns(), []

    def work(task: int, _: Workspace) -> None:
        with turns.turn(task):
            if task == 5:
                raise ValueError("five")
            done.append(task)

    with pytest.raises(ValueError, match="five"):
        run(range(10_000), work, Resources(threads=threads), turns)
    assert done == [0, 1, 2, 3, 4]


def test_an_error_while_tasks_are_made() -> None:
    def tasks() -> object:
        yield 1
        raise KeyError("no more")

    with pytest.raises(KeyError):
        run(tasks(), lambda *_: None, Resources(threads=2))  # type: ignore[arg-type]


def test_buffers_are_reused_and_grow() -> None:
    workspace = Workspace()
    first = workspace.buffer("a", 10, torch.float32)
    assert workspace.buffer("a", 5, torch.float32).data_ptr() == first.data_ptr()
    assert workspace.buffer("b", 10, torch.float32).data_ptr() != first.data_ptr()
    assert workspace.buffer("a", 20, torch.float32).numel() == 20
    assert workspace.buffer("a", 3, torch.uint8).dtype == torch.uint8


def test_torchs_own_threads_are_as_before_and_off_meanwhile() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    run(range(3), lambda *_: seen.append(torch.get_num_threads()), Resources(threads=2))
    assert torch.get_num_threads() == before and set(seen) == {1}


def test_the_budget_decides_on_threads() -> None:
    assert Resources(threads=3, memory=2**40).workers() == 3
    assert Resources(memory=2**40).workers() == min(8, len(os.sched_getaffinity(0)))
    least = next(m for m in range(2**20, 2**40, 2**20) if _fits(m))
    assert Resources(threads=64, memory=least).workers() == 1
    assert 1 < Resources(threads=64).workers() < 64
    assert Resources(threads=2).expected_memory() > Resources(threads=1).expected_memory()
    with pytest.raises(UsageError, match="too small") as failed:
        Resources(memory=least - 1).workers()
    assert f"{least // 2**20}M" in failed.value.remedy
    assert Resources(threads=64, memory=2 * least).workers(2**24) < Resources(threads=64, memory=2 * least).workers()
    with pytest.raises(UsageError, match="too small") as failed:
        Resources(memory=least).workers(2**20)
    assert f"{least // 2**20 + 1}M" in failed.value.remedy
    assert Resources().workers(2**40) == 1  # no limit was given
    with pytest.raises(UsageError, match="--threads 0"):
        Resources(threads=0).workers()


def _fits(memory: int) -> bool:
    try:
        return Resources(threads=1, memory=memory).workers() == 1
    except UsageError:
        return False


def test_a_whole_matrix_has_to_fit_a_budget_that_was_given() -> None:
    Resources().require_matrix(2**30, "w")  # the default is no limit
    Resources(memory=2**31).require_matrix(2**24, "w")
    with pytest.raises(UsageError, match="w: factorising it needs about") as failed:
        Resources(memory=2**29).require_matrix(2**26, "w")
    assert "--memory" in failed.value.remedy


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "xla"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(UsageError, match=f"--device {device} cannot be used"):
        Resources(device=device)


def test_progress_adds_up() -> None:
    told: list[tuple[int, int]] = []
    progress = Progress(100, lambda done, total: told.append((done, total)))
    run(range(10), lambda *_: progress.advance(10), Resources(threads=4))
    assert told == [(10 * (i + 1), 100) for i in range(10)]


def test_a_signal_ends_it_promptly() -> None:
    code = (
        "import signal, threading, time\nfrom weightlab.stream.executor import Resources, run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background has it ignored
        "def work(task, workspace):\n    print(task, flush=True)\n    time.sleep(0.05)\n"
        "try:\n    run(range(10**9), work, Resources(threads=2))\n"
        "except KeyboardInterrupt:\n    print('stopped', threading.active_count(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert rest.endswith("stopped 1\n") and process.returncode == 0


def test_room_for_what_fits_together() -> None:
    room, held, most, alone = Room(10), 0, 0, []
    lock = threading.Lock()

    def work(size: int, workspace: Workspace) -> None:
        nonlocal held, most
        with room.take(size):
            with lock:
                held += size
                most = max(most, held)
                if size > 10:
                    alone.append(held == size)
            time.sleep(0.002)
            with lock:
                held -= size

    run([4, 5, 3, 25, 6, 4, 10, 1, 1, 25] * 4, work, Resources(threads=4))
    assert held == 0 and all(alone) and len(alone) == 8 and 8 < most <= 25
    with pytest.raises(ZeroDivisionError), room.take(7):
        raise ZeroDivisionError
    with room.take(25):  # what an error left is free again
        pass


def test_room_for_matrices_is_what_the_budget_leaves() -> None:
    small, large = (Resources(threads=2, memory=memory).room_for_matrices().size for memory in (2**29, 2**32))
    assert 0 < small * 40 < 2**29 < large * 40 < 2**32
    assert Resources(threads=2).room_for_matrices().size < Resources(threads=4).room_for_matrices().size


def test_others_come_when_tasks_take_long() -> None:
    """While they are short one thread works alone, unless it is held up."""
    seen: list[int] = []

    def work(task: float, workspace: Workspace) -> None:
        seen.append(threading.get_ident())
        time.sleep(task)

    run([0.0] * 2000, work, Resources(threads=4))
    assert len(seen) == 2000
    seen.clear()
    run([0.0] * 500 + [0.02] * 40, work, Resources(threads=4))
    assert len(set(seen)) == 4 and len(seen) == 540
