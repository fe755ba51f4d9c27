"""A server as a process of its own: signals, exit codes, health, reflection, sockets, and what it writes to its log."""

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server import nursery, shapes
from tests.server.conftest import Sources
from tests.server.files import upload_messages
from tests.server.live import WAIT_S, Client, refused, wait_until
from weft.v1 import adapter_service_pb2, generation_pb2

SERVICES = {"weft.v1.GenerationService", "weft.v1.AdapterService"}
_GENERATION = health_pb2.HealthCheckRequest(service="weft.v1.GenerationService")
CANARY = "canary-7f3a9c"  # texts that must not be found again


class Nursery:
    """The process that forks servers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, nursery.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        while answer == "ready":
            answer = self._process.stdout.readline().strip()
        return int(answer)

    def close(self) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


@pytest.fixture(scope="session", autouse=True)
def nursery_process() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


class ServerProcess:
    """`weft serve` with these arguments. first: a script that the process runs before."""

    def __init__(self, nursery: Nursery, log: Path, arguments: Sequence[str], *, first: Path | None = None) -> None:
        self._nursery = nursery
        self._log = log
        command: dict[str, object] = {"start": ["serve", *arguments], "log": str(log)}
        self.pid = nursery.ask(command if first is None else command | {"first": str(first)})
        self._exit_code: int | None = None

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_ready(self) -> None:
        wait_until(lambda: "\nready" in self.log or not self.is_alive)
        assert self.is_alive, self.log
        found = re.search(r"gRPC +127\.0\.0\.1:(\d+)\n +metrics +http://127\.0\.0\.1:(\d+)/metrics", self.log)
        assert found, self.log
        self.port, self.metrics_port = int(found[1]), int(found[2])
        self.client = Client(self.port)

    @property
    def is_alive(self) -> bool:
        """Whether the process is neither gone nor a zombie."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def exit_code(self) -> int:
        if self._exit_code is None:
            wait_until(lambda: not self.is_alive)
            self._exit_code = self._nursery.ask({"wait": self.pid})
        return self._exit_code

    def end(self) -> None:
        if self._exit_code is None:
            if self.is_alive:
                self.signal(signal.SIGKILL)
            self.exit_code()


class Started:
    """A starter of servers, which ends those that are left."""

    def __init__(self, nursery: Nursery, base_path: Path, directory: Path) -> None:
        self._nursery = nursery
        self._base_path = base_path
        self._directory = directory
        self._all: list[ServerProcess] = []

    def __call__(self, *flags: str) -> ServerProcess:
        number = len(self._all)
        defaults = ("--port", "0", "--metrics-port", "0", "--device", "cpu", "--num-threads", "1")
        store = ("--store", str(self._directory / f"store-{number}"))
        arguments = [str(self._base_path), *defaults, *store, *flags]
        self._all.append(ServerProcess(self._nursery, self._directory / f"log-{number}", arguments))
        return self._all[-1]

    def end(self) -> None:
        for process in self._all:
            process.end()


@pytest.fixture(scope="module")
def start(nursery_process: Nursery, base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(nursery_process, base_path, tmp_path_factory.mktemp("processes"))
    yield started
    started.end()


@pytest.fixture(scope="module")
def process(start: Started, sources: Sources) -> ServerProcess:
    """Start a server that logs everything, for tests that leave it running."""
    process = start("--log-level", "debug", "--adapter", f"lora={sources('lora-1')}")
    process.wait_ready()
    return process


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_base_starts_in_4_gib_without_a_flag(name: str, nursery_process: Nursery, tmp_path: Path) -> None:
    """The context is fitted to memory and the banner says so; a real limit of the process takes the machine's place."""
    started = Started(nursery_process, shapes.save(tmp_path / name, name), tmp_path)
    process = started()
    try:
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (4 << 30, 4 << 30))
        process.wait_ready()
        found = re.search(r"context +(\d+) tokens(, cut from the model's (\d+) to (\d+) tokens, .*)?", process.log)
        assert found, process.log
        limit = shapes.SHAPES[name].max_position_embeddings
        assert 2048 <= int(found[1]) <= limit
        assert (int(found[1]) < limit) == bool(found[2])
        assert "--kv-cache-bytes" in process.log or not found[2]
        left = re.search(r"left +([\d.]+) GiB", process.log)
        assert left is not None
        assert 0 < float(left[1]) < 4
        assert len(process.client.tokens(None, 8)) == 8
    finally:
        started.end()


def test_a_context_that_cannot_be_is_refused_in_one_line(start: Started) -> None:
    for flags, said in (
        (("--max-model-len", "99999999"), "max_model_len must be at most 256, the model's own limit, given 99999999"),
        (("--max-model-len", "256", "--kv-cache-bytes", "1KiB"), "raise kv_cache_bytes to"),
        (("--adapter", "x=/typo"), "--adapter x: /typo does not exist"),
    ):
        process = start(*flags)
        assert process.exit_code() in (1, 2)
        assert said in process.log
        assert "Traceback" not in process.log


def _health(process: ServerProcess) -> health_pb2_grpc.HealthStub:
    return health_pb2_grpc.HealthStub(process.client.channel)


def _reflected(process: ServerProcess, **request: str) -> Message:
    stub = reflection_pb2_grpc.ServerReflectionStub(process.client.channel)
    return next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=WAIT_S))


def test_health_and_reflection(process: ServerProcess) -> None:
    for service in ("", *SERVICES):
        answer = _health(process).Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service
    with pytest.raises(grpc.RpcError) as unknown:
        _health(process).Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=WAIT_S)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    listed = _reflected(process, list_services="")
    names = {service.name for service in listed.list_services_response.service}  # pyright: ignore
    assert names == SERVICES | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    for service in SERVICES:
        described = _reflected(process, file_containing_symbol=service)
        assert described.file_descriptor_response.file_descriptor_proto  # pyright: ignore


def _listening(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket on which a process listens, in the kernel's spelling."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except FileNotFoundError:  # closed meanwhile
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add((address, int(port, 16)))
    return found


def test_only_loopback_is_listened_on(process: ServerProcess) -> None:
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
    listening = _listening(process.pid)
    assert {port for _, port in listening} == {process.port, process.metrics_port}
    assert {address for address, _ in listening} <= loopback
    # Negative control: a socket that is open to all is detected.
    with socket.socket() as open_to_all:
        open_to_all.bind(("", 0))
        open_to_all.listen()
        ours = {address for address, port in _listening(os.getpid()) if port == open_to_all.getsockname()[1]}
        assert ours == {"00000000"}


def test_metrics_are_served_and_nothing_else(process: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", process.metrics_port, timeout=WAIT_S)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert "weft_build_info{" in text
    assert 'model="tiny-llama"' in text


def test_prompts_never_reach_the_log(process: ServerProcess, sources: Sources) -> None:
    """At the level debug, for calls that succeed and calls that are refused, in every field that a caller fills."""
    client = process.client
    said = {"messages": [{"role": "user", "content": CANARY}]}
    answers = [
        client.generate(text=f"{CANARY} is the prompt"),
        client.generate("lora", text=CANARY, stopping={"max_new_tokens": 4, "stop": [CANARY]}, cache_salt=CANARY),
        client.generate(messages=said),
        client.stream("lora", text=CANARY).result(),
    ]
    client.tokenize(text=CANARY, pieces=True)
    for refusal in (
        lambda: client.generate(text=CANARY * 100),
        lambda: client.generate(text=CANARY, sampling={"temperature": -1}),
        lambda: client.generate(text=CANARY, adapter_id="nobody"),
        lambda: client.generate(text=CANARY, stopping={"stop": [CANARY * 20]}),
        lambda: client.generate(text=CANARY, cache_salt=CANARY * 20),
        lambda: client.generate(text=CANARY, request_id="x y"),
        lambda: client.register("new", f"https://user:{CANARY}@example.org/x"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            refusal()
        assert CANARY not in (error.value.details() or "")
    malformed = generation_pb2.GenerateRequest(text=CANARY).SerializeToString() + b"\xff"
    with pytest.raises(grpc.RpcError) as error:
        client.channel.unary_unary("/weft.v1.GenerationService/Generate")(malformed, timeout=WAIT_S)
    assert CANARY not in (error.value.details() or "")
    cancelled = client.generation.StreamGenerate(client.request(None, 200, text=CANARY))
    next(cancelled)
    cancelled.cancel()
    parts = sources.parts("lora-2")
    files = parts._replace(metadata={**parts.metadata, "note": CANARY}).configured(base_model_name_or_path=CANARY)
    client.upload(upload_messages("uploaded", files))
    client.unregister("uploaded")
    connection = http.client.HTTPConnection("127.0.0.1", process.metrics_port, timeout=WAIT_S)
    connection.request("GET", "/metrics")
    assert CANARY not in connection.getresponse().read().decode()
    assert CANARY not in process.log
    assert not any(answer.text and answer.text in process.log for answer in answers), "answers are private too"
    # Negative control: the log is on, at the most verbose level.
    assert " DEBUG " in process.log


def test_a_port_that_is_taken(start: Started, process: ServerProcess, sources: Sources) -> None:
    """The same for other reasons not to start: one line with the reason, and an exit code for a supervisor."""
    failing = {
        f"port: cannot listen on 127.0.0.1:{process.port}": start("--port", str(process.port)),
        f"metrics_port: cannot listen on 127.0.0.1:{process.metrics_port}": start(
            "--metrics-port", str(process.metrics_port)
        ),
        "ID_INVALID": start("--adapter", f"../x={sources('lora-1')}"),
    }
    for says, other in failing.items():
        assert other.exit_code() != 0, says
        assert says in " ".join(other.log.split()), other.log
        assert "Traceback" not in other.log
    assert process.client.tokens(num_tokens=2), "the one that was there first is not disturbed"


def test_sigterm_drains(start: Started, sources: Sources) -> None:
    """Running streams finish, new calls are sent elsewhere, health says so first, and the exit code is 0."""
    process = start("--adapter", f"lora={sources('lora-1')}", "--max-num-seqs", "2")
    process.wait_ready()
    client = process.client
    wanted = {name: client.tokens(name, 100) for name in (None, "lora")}
    assert wanted[None] != wanted["lora"]
    statuses, ended = _watched_health(process)
    wait_until(lambda: len(statuses) == 1)
    leaver = _health(process).Watch(_GENERATION, timeout=WAIT_S)
    next(leaver)
    leaver.cancel()  # and the other one is not forgotten
    watched = client.adapters.WatchAdapters(adapter_service_pb2.WatchAdaptersRequest(), timeout=WAIT_S)
    assert next(watched).adapter.adapter_id == "lora"
    streams = [(name, client.stream(name, 100)) for name in (None, "lora") * 3]  # two run, four wait
    streams[0][1].wait_tokens(5)
    process.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in process.log)
    for call in (client.generate, client.stream, lambda: client.register("new", sources("lora-2"))):
        refused(call, "UNAVAILABLE", "DRAINING", retry=True)
    assert any(stream.is_running for _, stream in streams), "it was over before it was asked"
    for name, stream in streams:
        assert stream.result().tokens == wanted[name], name
    serving, gone = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert ended.wait(WAIT_S)
    assert statuses == [serving, gone]
    refused(lambda: list(watched), "UNAVAILABLE", "DRAINING")
    assert process.exit_code() == 0
    assert "Traceback" not in process.log
    # It left nothing unfinished: a server starts again with the same store.
    assert not list((start._directory / f"store-{len(start._all) - 1}" / "staging").iterdir())


def test_a_second_signal_is_fast(start: Started) -> None:
    process = start("--max-num-seqs", "1", "--drain-timeout-s", "60")
    process.wait_ready()
    streams = [process.client.stream(None, 200) for _ in range(40)]  # many seconds of work, one after the other
    streams[0].wait_tokens(3)
    process.signal(signal.SIGTERM)
    wait_until(lambda: "draining" in process.log)
    assert process.is_alive
    hurried = time.monotonic()
    process.signal(signal.SIGINT)
    assert process.exit_code() == 0
    assert time.monotonic() - hurried < 10
    ended = 0
    for stream in streams:
        try:
            stream.result()
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # pyright: ignore  # noqa: PT017  the streams end in either way
            ended += 1
    assert ended > 30, "they were waited for"
    assert "not waiting any longer" in process.log


def test_sigterm_while_the_base_loads(start: Started) -> None:
    process = start()
    wait_until(lambda: process.log != "" or not process.is_alive)
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    assert "Traceback" not in process.log


def _watched_health(process: ServerProcess) -> tuple[list[int], threading.Event]:
    """Return the statuses that a watch reports, as they come, and whether it has ended."""
    statuses: list[int] = []
    ended = threading.Event()
    watch = _health(process).Watch(_GENERATION, timeout=WAIT_S)

    def read() -> None:
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            statuses.extend(update.status for update in watch)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    return statuses, ended
