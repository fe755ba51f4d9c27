"""Server process of a demo on loopback, and the demo's reports of its steps."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

_READY_TIMEOUT_S = 300.0  # enough for a loaded machine to read and self-test a base of 135M parameters


class DemoFailure(Exception):
    """A step of the demo that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is ready."""

    address: str
    metrics_url: str
    process: "subprocess.Popen[str]"


@contextmanager
def serving(
    console: Console, base: Path, sources: Sequence[Path], scratch: Path, *, quantization: str = "nf4"
) -> Iterator[Server]:
    """Serve `base` with adapters from the directories `sources`; shut down cleanly after the block."""
    port, metrics_port = _free_ports(2)
    command = [sys.executable, "-m", "weft", "serve", str(base), "--quant", quantization]
    command += ["--store", str(scratch / "store"), "--port", str(port), "--metrics-port", str(metrics_port)]
    command += [argument for source in sources for argument in ("--allowed-source", str(source.resolve()))]
    log = scratch / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    server = Server(
        address=f"127.0.0.1:{port}", metrics_url=f"http://127.0.0.1:{metrics_port}/metrics", process=process
    )
    try:
        with console.status("starting the server …"):
            _wait_ready(server, log)
        yield server
        step(console, "Shut down")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        console.print(f"  SIGTERM → drained, exit code {code}")
        require(code == 0, f"the server ended cleanly\n{log.read_text()[-2000:]}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_ready(server: Server, log: Path) -> None:
    until = time.monotonic() + _READY_TIMEOUT_S
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # pyright: ignore[reportAttributeAccessIssue]  # untyped
        while time.monotonic() < until:
            if server.process.poll() is not None:
                raise DemoFailure(f"the server did not start:\n{log.read_text()[-2000:]}")
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=1).status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                time.sleep(0.1)
    raise DemoFailure(f"the server was not ready after {_READY_TIMEOUT_S:g} s:\n{log.read_text()[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def step(console: Console, title: str) -> None:
    """Print the title of the next step."""
    console.print(f"[bold cyan]▸ {title}[/bold cyan]")


def require(condition: bool, what: str) -> None:
    """Raise DemoFailure unless the condition holds."""
    if not condition:
        raise DemoFailure(f"not so: {what}")
