"""Abuse of HTTP/2 by raw frames: others are answered in full, memory stays bounded, and nothing is left (P35, T27).

Client, attacker and server share this machine's cores, so no time is compared.
"""

import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from benchmarks.backends import http2
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import WAIT_S, Client, wait_until

_ATTACK_S = 1.5
_CANCEL = 8  # an error code of RST_STREAM
_CONNECTIONS = 8
_GENERATE = "/weft.v1.GenerationService/Generate"
_MIB = 1 << 20


class Served:
    """`weft serve` as a process, and what can be seen of it."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        wait_until(lambda: "\nready" in log.read_text() or process.poll() is not None)
        found = re.search(r"gRPC +\S+:(\d+)\n +metrics +(\S+)", log.read_text())
        assert found, log.read_text()
        self.port, self._metrics = int(found[1]), found[2]

    def rss_bytes(self) -> int:
        return rss_bytes(self.process.pid)

    def metric(self, name: str, **labels: str) -> float:
        with urllib.request.urlopen(self._metrics, timeout=WAIT_S) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def rss_bytes(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def served(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("abused")
    log = directory / "log"
    command = (sys.executable, "-m", "weft", "serve", str(path), "--store", str(directory / "store"))
    flags = ("--device", "cpu", "--num-threads", "1", "--port", "0", "--metrics-port", "0")
    with log.open("wb") as file, subprocess.Popen((*command, *flags), stdout=file, stderr=file) as process:
        try:
            yield Served(process, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0, log.read_text()
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    connection.sendall(http2._PREFACE + http2._frame(http2._SETTINGS, 0, 0, b""))
    return connection


def _headers(stream: int, port: int) -> bytes:
    block = http2._header_block(_GENERATE, f"127.0.0.1:{port}")
    return http2._frame(http2._HEADERS, http2._END_HEADERS, stream, block)


def _drained(connection: socket.socket) -> bytes:
    """Return what the server has sent so far."""
    readable, _, _ = select.select([connection], [], [], 0)
    return connection.recv(1 << 20) if readable else b""


def _finish(connection: socket.socket) -> None:
    """Wait until the server has read all that was sent: it answers a last ping after the rest."""
    last = b"the last"
    connection.sendall(http2._frame(http2._PING, 0, 0, last))
    answer, seen = http2._frame(http2._PING, http2._ACK, 0, last), b""
    while answer not in seen:
        came = connection.recv(1 << 20)
        if not came:
            raise ConnectionError
        seen = seen[-len(answer) :] + came


def _reset(port: int, over: threading.Event) -> int:
    """Begin calls and cancel them at once, 50 in a write, 10,000 on a connection; return how many the server read."""
    message = Client(port).request(num_tokens=8).SerializeToString()
    body = struct.pack("!BI", 0, len(message)) + message
    cancel = struct.pack("!I", _CANCEL)
    count = 0
    for _ in range(4):
        with suppress(ConnectionError), _connected(port) as connection:
            for first in range(1, 20_000, 100):
                calls = [
                    _headers(stream, port)
                    + http2._data(stream, body)
                    + http2._frame(http2._RST_STREAM, 0, stream, cancel)
                    for stream in range(first, first + 100, 2)
                ]
                connection.sendall(b"".join(calls))
                _drained(connection)
            _finish(connection)
            count += 10_000
    return count


def _ping(port: int, over: threading.Event) -> int:
    """Send pings without a call, 100 in a write; return how many the server read."""
    pings = http2._frame(http2._PING, 0, 0, bytes(8)) * 100
    count = 0
    for _ in range(5):
        with suppress(ConnectionError), _connected(port) as connection:
            for _ in range(100):
                connection.sendall(pings)
                _drained(connection)
            _finish(connection)
            count += 10_000
    return count


def _open(port: int, over: threading.Event) -> int:
    """Hold connections of 1,000 calls each that never send their message; return how many it read."""
    with ExitStack() as held:
        for _ in range(_CONNECTIONS):
            connection = held.enter_context(_connected(port))
            connection.sendall(b"".join(_headers(stream, port) for stream in range(1, 2000, 2)))
            _finish(connection)
        over.wait(WAIT_S)
    return 1000 * _CONNECTIONS


@pytest.mark.parametrize("attack", [_reset, _ping, _open], ids=["rapid reset", "pings", "empty streams"])
def test_a_victim_is_answered_and_memory_is_bounded(
    attack: Callable[[int, threading.Event], int], served: Served
) -> None:
    victim = Client(served.port)
    wanted, before = victim.tokens(), served.rss_bytes()
    answers, peak, over = [], before, threading.Event()
    with ThreadPoolExecutor(1) as attacker:
        attacking = attacker.submit(attack, served.port, over)
        until = time.monotonic() + _ATTACK_S
        try:
            while not answers or time.monotonic() < until:
                answers.append(victim.tokens())
                peak = max(peak, served.rss_bytes())
        finally:
            over.set()
        assert attacking.result(WAIT_S) >= 8000
    assert answers == [wanted] * len(answers)
    assert (peak - before) / _MIB < 256
    wait_until(lambda: served.metric("weft_requests_running") + served.metric("weft_requests_waiting") == 0)
    assert served.metric("weft_kv_blocks", state="used") == 0
    assert Client(served.port).tokens() == wanted  # on a new connection
    print(f"{len(answers)} answers, +{(peak - before) / _MIB:.0f} MiB")


def test_growth_would_be_seen() -> None:
    """Negative control of the measure of memory."""
    code = "import sys; held = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert rss_bytes(process.pid) > 64 * _MIB
