"""Arrivals of a trace's requests, for a backend that steps its engine itself. Standard library only."""

import time

from benchmarks import workload


class Arrivals:
    """Requests and registrations of a trace that are still to come; `started_s` is on the monotonic clock."""

    def __init__(self, trace: workload.Trace, started_s: float) -> None:
        self._started_s = started_s
        self._requests = list(enumerate(trace.requests))[::-1]
        self._registrations = list(trace.registrations)[::-1]

    def is_left(self) -> bool:
        """Return whether requests are still to come; registrations after the last one never take place."""
        return bool(self._requests)

    def requests(self) -> list[tuple[int, workload.Request]]:
        """Return the requests due by now, each once, with their indices in the trace."""
        now = []
        while self._requests and self._requests[-1][1].arrival_s <= self._passed_s():
            now.append(self._requests.pop())
        return now

    def registrations(self) -> list[workload.Registration]:
        """Return the registrations due by now, each once."""
        now = []
        while self._registrations and self._registrations[-1].arrival_s <= self._passed_s():
            now.append(self._registrations.pop())
        return now

    def wait(self) -> None:
        """Sleep until the next request is due."""
        if self._requests:
            time.sleep(max(0.0, self._requests[-1][1].arrival_s - self._passed_s()))

    def _passed_s(self) -> float:
        return time.monotonic() - self._started_s
