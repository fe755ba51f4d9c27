"""What attacks need: a server process of its own, its memory as it was all the while, and many callers at once."""

import re
import resource
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import WAIT_S, Client
from weft.client.failure import failure_of
from weft.config import MIB

ROOT = Path(__file__).parents[2]
DEMO_BASE = ROOT / "models" / "weft-demo"
DEMO_ADAPTERS = ROOT / "adapters_store" / "demo"
MEGABYTE_OF_TEXT = "ab " * 349_000
T = TypeVar("T")


class Memory(NamedTuple):
    """What a process holds at a moment."""

    rss_mib: float
    num_threads: int
    num_descriptors: int


@dataclass(slots=True)
class Samples:
    """What a process held over a time."""

    memory: list[Memory] = field(default_factory=list)

    @property
    def peak(self) -> Memory:
        return Memory(*map(max, zip(*self.memory, strict=True)))


class Target:
    """`weft serve` of the demo base, in a process of its own."""

    def __init__(self, store: Path, *flags: str, adapters: Sequence[str] = (), max_files: int | None = None) -> None:
        ports = ("--port", "0", "--metrics-port", "0")
        registered = [f"--adapter={name}={DEMO_ADAPTERS / name}" for name in adapters]
        command = [sys.executable, "-m", "weft", "serve", str(DEMO_BASE), *ports, "--num-threads", "1"]
        command += ["--store", str(store), "--allowed-source", str(DEMO_ADAPTERS), *registered, *flags]

        def limit() -> None:
            if max_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, preexec_fn=limit
        )
        assert self.process.stdout is not None
        self.log = ""
        for line in self.process.stdout:
            self.log += line
            if line == "ready\n":
                break
        found = re.search(r"gRPC +127\.0\.0\.1:(\d+)\n +metrics +http://127\.0\.0\.1:(\d+)/metrics", self.log)
        assert found, self.log
        self.port, self.metrics_port = int(found[1]), int(found[2])
        threading.Thread(target=self._read, daemon=True).start()
        self.client = self.connect()

    def connect(self) -> Client:
        """Return a client with a connection of its own."""
        return Client(self.port, options=[("grpc.use_local_subchannel_pool", 1)])

    def memory(self) -> Memory:
        return memory_of(self.process.pid)

    @contextmanager
    def sampled(self, period_s: float = 0.02) -> Iterator[Samples]:
        """Sample the memory until the block ends."""
        samples, ends = Samples([self.memory()]), threading.Event()

        def sample() -> None:
            while not ends.wait(period_s):
                samples.memory.append(self.memory())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            ends.set()
            thread.join()

    def is_serving(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self.client.channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == 1

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT_S) as response:
            families = text_string_to_metric_families(response.read().decode())
            return sum(
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == name and labels.items() <= sample.labels.items()
            )

    def terminate(self, timeout_s: float) -> tuple[int, float]:
        """Send SIGTERM; return the exit code, and the seconds that the exit took."""
        started = time.monotonic()
        self.process.terminate()
        return self.process.wait(timeout_s), time.monotonic() - started

    def close(self) -> None:
        self.client.channel.close()
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log += line
        self.process.stdout.close()


def memory_of(pid: int) -> Memory:
    """Return what a process holds now."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    threads = re.search(r"^Threads:\s+(\d+)", (process / "status").read_text(), re.MULTILINE)
    assert threads
    num_descriptors = len(list((process / "fd").iterdir()))
    return Memory(pages * resource.getpagesize() / MIB, int(threads[1]), num_descriptors)


def outcome(call: Callable[[], object]) -> str:
    """Return how a call ends: OK, or the code and the reason."""
    try:
        call()
    except grpc.RpcError as error:
        failure = failure_of(error)
        return f"{failure.code.name}/{failure.reason}"
    return "OK"


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls at once; return what they return."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))
