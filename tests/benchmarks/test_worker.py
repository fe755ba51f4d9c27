"""The protocol between the suite and a backend, with a real process on the other end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks import workload
from benchmarks.backends.remote import Failed, Remote
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome, Record

SPEC = LoadSpec(model="/nowhere", adapters=(("one", "/nowhere/one"), ("two", "/nowhere/two")))


def asking(wish: str) -> workload.Trace:
    return workload.Trace(
        requests=(
            workload.Request(arrival_s=0.0, adapters=(wish,), prompt=(5, 6), num_new_tokens=2),
            workload.Request(arrival_s=0.5, adapters=(), prompt=(7,), num_new_tokens=1),
        )
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "scripted.log"


@pytest.fixture
def remote(log: Path) -> Iterator[Remote]:
    started = Remote([sys.executable, "-m", "tests.benchmarks.scripted_worker"], log=log, threads=3)
    yield started
    started.close(limit_s=5)


@pytest.fixture
def run(remote: Remote, tmp_path: Path) -> Callable[..., Outcome]:
    def run(wish: str = "serves", *, limit_s: float = 30) -> Outcome:
        trace = asking(wish)
        return remote.run(trace, workload.write(trace, tmp_path / "trace.jsonl"), salt="salt", limit_s=limit_s)

    return run


def test_answers_come_through_whatever_a_library_prints(remote: Remote, run: Callable[..., Outcome], log: Path) -> None:
    assert remote.load(SPEC, limit_s=30) == {"adapters": "2", "threads": "3"}
    outcome = run()
    assert outcome.records == (
        Record(arrival_s=100.0, token_s=(101.0, 102.0), token_ids=(0, 1)),
        Record(arrival_s=100.5, token_s=(101.5,), token_ids=(0,)),
    )
    assert outcome.notes == {"client_cpu_s": 0.5}
    remote.close()
    printed = {"a library prints as it loads", "and so does what is written in C", "closed"}
    assert set(log.read_text().splitlines()) == printed


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("dies", "died with exit code 7\n    the last words"),
        ("is silent", "silent for 0.5 s"),
        ("breaks", "RuntimeError: no such kernel"),
        ("is short", r"answers of \[1, 0\] tokens where \[2, 1\] were asked"),
    ],
)
def test_a_broken_backend_says_how(run: Callable[..., Outcome], wish: str, expected: str) -> None:
    run()
    with pytest.raises(Failed, match=expected):
        run(wish, limit_s=0.5 if wish == "is silent" else 30)


def test_a_backend_that_broke_answers_the_next_run(run: Callable[..., Outcome]) -> None:
    with pytest.raises(Failed, match="no such kernel"):
        run("breaks")
    assert run().records


def test_a_backend_says_what_it_cannot(remote: Remote, run: Callable[..., Outcome]) -> None:
    with pytest.raises(Cannot, match="it has no nf4"):
        remote.load(LoadSpec(model="/nowhere", quantization="nf4"), limit_s=30)
    with pytest.raises(Cannot, match="it has no such adapters"):
        run("cannot")


def test_a_dead_backend_stays_dead(run: Callable[..., Outcome]) -> None:
    for wish in ("dies", "serves"):
        with pytest.raises(Failed, match="died with exit code 7"):
            run(wish)


def test_what_a_backend_started_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); input()"
    started = Remote([sys.executable, "-c", code], log=tmp_path / "log", threads=1)
    until = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    os.kill(pid, 0)  # it lives
    started.close(limit_s=0.2)
    while _lives(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
