"""The suite's side of a worker: starts a backend's process, sends commands, and reports why an answer is missing."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.backends import worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome

ROOT = Path(__file__).resolve().parents[2]
_NUM_LOG_LINES = 8


class Failed(Exception):
    """A backend that broke, died or stopped answering; the text has its last output."""


class Remote:
    """A backend in its own process, which starts at once. Close it even after it has failed."""

    def __init__(self, command: Sequence[str], *, log: Path, threads: int) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                env={**os.environ, **variables},
                start_new_session=True,  # so that its own children can be ended with it
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def load(self, spec: LoadSpec, *, limit_s: float) -> Mapping[str, str]:
        """Load the backend. Returns the versions of its packages. Raises Cannot and Failed."""
        return self._ask({"load": asdict(spec)}, limit_s)["loaded"]

    def run(self, trace: workload.Trace, path: Path, *, salt: str, limit_s: float) -> Outcome:
        """Run `trace`, which is stored at `path`, and return its outcome.

        Raises Cannot and Failed, the latter also if an answer is shorter or longer than requested.
        """
        answer = self._ask({"run": {"trace": str(path), "salt": salt}}, limit_s)
        outcome = worker.outcome(answer)
        asked = [request.num_new_tokens for request in trace.requests]
        given = [len(record.token_s) for record in outcome.records]
        if given != asked:
            raise Failed(f"answers of {given} tokens where {asked} were asked")
        return outcome

    def close(self, *, limit_s: float = 20.0) -> None:
        """Ask the backend to stop, then end it and its children. Does nothing the second time."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        try:
            self._ask({"stop": {}}, limit_s)
            self._process.wait(limit_s)
        except (Cannot, Failed, subprocess.TimeoutExpired):
            pass  # it is ended below in any case
        finally:
            self._kill()
            with contextlib.suppress(BrokenPipeError):  # of a command that the backend did not read
                self._process.stdin.close()

    def _ask(self, command: Mapping[str, Any], limit_s: float) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._kill()
            raise Failed(f"silent for {limit_s:g} s{self._last_words()}") from None
        except OSError:
            line = None
        if line is None:
            code = self._process.wait()
            raise Failed(f"died with exit code {code}{self._last_words()}")
        answer = json.loads(line)
        if "cannot" in answer:
            raise Cannot(answer["cannot"])
        if "failed" in answer:
            raise Failed(f"{answer['failed']}{self._last_words()}")
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        with self._log.open(errors="replace") as file:
            last = [line.rstrip() for line in deque(file, _NUM_LOG_LINES)]
        return "".join(f"\n    {line}" for line in last)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended with all its children
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
