"""A serving process has one team of OpenMP threads, the engine's."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from weft.model.threads import compute_alone, compute_with, on_a_thread_that_ends

_LARGE = 1 << 20  # elements: torch computes so many in parallel

_COUNT = """
import os, sys, threading, time
import torch
from weft.model.threads import compute_alone, compute_with, on_a_thread_that_ends

def num_threads():
    return len(os.listdir("/proc/self/task"))

def work():
    torch.ones({large}).add(1).exp()
    return num_threads()

before = num_threads()
{how}
"""


def _run(how: str) -> list[int]:
    code = _COUNT.format(large=_LARGE, how=how)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
@pytest.mark.skipif(torch.get_num_threads() < 2, reason="a team of one has no thread to leave behind")
class TestTeams:
    def test_loading_leaves_no_team_behind(self) -> None:
        how = """
within = on_a_thread_that_ends(work, num_threads=3)
deadline = time.monotonic() + 20
while num_threads() > within - 3 and time.monotonic() < deadline:
    time.sleep(0.01)
print(within, num_threads())
"""
        within, after = _run(how)
        assert within - after == 3  # the thread itself and two more; another pool of torch remains asleep

    def test_a_thread_that_stays_would_keep_its_team(self) -> None:
        within, after = _run("compute_with(3)\nwithin = work()\ntime.sleep(0.5)\nprint(within, num_threads())")
        assert within == after

    def test_threads_that_compute_alone_get_no_team(self) -> None:
        how = """
found = []
def alone():
    compute_alone()
    found.append(work())
thread = threading.Thread(target=alone)
thread.start()
thread.join()
print(before, found[0])
"""
        before, within = _run(how)
        assert within == before + 1


def test_each_thread_keeps_its_own_number() -> None:
    found: dict[str, int] = {}
    begun, alone = threading.Event(), threading.Event()

    def engine() -> None:
        compute_with(2)
        begun.set()
        assert alone.wait(20)
        torch.ones(_LARGE).exp()  # the first operation of the thread, after another set the number that new ones get
        found["engine"] = torch.get_num_threads()

    def worker() -> None:
        assert begun.wait(20)
        compute_alone()
        found["worker"] = torch.get_num_threads()
        alone.set()

    threads = [threading.Thread(target=engine), threading.Thread(target=worker)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"engine": 2, "worker": 1}


def test_what_fails_while_loading_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        on_a_thread_that_ends(fail, num_threads=1)
