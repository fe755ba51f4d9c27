"""Floods from outside: many callers of what costs the server memory, disk, threads or descriptors.

Each is one of a server process of its own, at its default limits, and in numbers that brought the server down before.
"""

import hashlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.reliability import wire
from tests.reliability.attacks import DEMO_ADAPTERS, MEGABYTE_OF_TEXT, Target, outcome, together
from tests.server.files import Files, upload_messages
from tests.server.live import WAIT_S, refused, wait_until
from weft.config import MIB, ServerConfig
from weft.v1 import adapter_service_pb2, generation_pb2, generation_service_pb2
from weft.v1.adapter_files import PEFT_FILES

pytestmark = pytest.mark.xdist_group("reliability-floods")

Start = Callable[..., Target]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Yield a function that starts a server, which ends with the test."""
    started: list[Target] = []

    def start(*flags: str, **options: object) -> Target:
        started.append(Target(tmp_path / f"store-{len(started)}", *flags, **options))  # pyright: ignore[reportArgumentType]
        return started[-1]

    yield start
    for target in started:
        target.close()


def _tokenize(target: Target, text: str) -> Callable[[], str]:
    request = generation_service_pb2.TokenizeRequest(text=text)
    return lambda: outcome(lambda: target.client.generation.Tokenize(request, timeout=WAIT_S))


def _files(name: str) -> Files:
    return Files(*((DEMO_ADAPTERS / name / file).read_bytes() for file in PEFT_FILES))


def test_t19_long_prompts_are_refused_before_they_are_tokenized(start: Start) -> None:
    """Before: 12 texts of 1 MiB, none of which fits, took 2.6 GB."""
    target = start(adapters=["reverse-lora"])
    target.client.generate("reverse-lora", 2, text="hello world")
    request = target.client.request("reverse-lora", 2, text=MEGABYTE_OF_TEXT)
    with target.sampled() as samples:
        ends = together([lambda: outcome(lambda: target.client.generation.Generate(request, timeout=WAIT_S))] * 12)
    assert ends == ["INVALID_ARGUMENT/PROMPT_TOO_LONG"] * 12
    assert samples.peak.rss_mib - samples.memory[0].rss_mib < 200


def test_t14_t29_tokenize_calls_wait_in_a_bounded_line_that_no_exit_waits_for(start: Start) -> None:
    """Row 103. Before: 80 calls of 1 MiB took 3.5 GB, none ended within a minute, and SIGTERM took 70 s."""
    target = start("--drain-timeout-s", "5", adapters=["reverse-lora"])
    with target.sampled() as samples:
        answers: list[str] = []
        calls = [
            threading.Thread(target=lambda: answers.append(_tokenize(target, MEGABYTE_OF_TEXT)())) for _ in range(80)
        ]
        for call in calls:
            call.start()
        for _ in range(3):
            target.client.generate("reverse-lora", 4, text="hello world")
        wait_until(lambda: answers.count("RESOURCE_EXHAUSTED/CALLS_FULL") >= 40)
        exit_code, exit_s = target.terminate(WAIT_S)
        for call in calls:
            call.join()
    assert set(answers) <= {"OK", "RESOURCE_EXHAUSTED/CALLS_FULL", "UNAVAILABLE/DRAINING", "UNAVAILABLE/"}
    assert samples.peak.rss_mib - samples.memory[0].rss_mib < 1500
    assert exit_code == 0
    assert exit_s < 5 + 10


def test_t13_registrations_copy_a_few_files_at_a_time(start: Start, tmp_path: Path) -> None:
    """Row 108. Before: 60 calls put 60 files of 40 MiB into staging at once."""
    source = tmp_path / "source"
    source.mkdir()
    (source / PEFT_FILES.config).write_bytes((DEMO_ADAPTERS / "upper-lora" / PEFT_FILES.config).read_bytes())
    with (source / PEFT_FILES.weights).open("wb") as file:
        file.truncate(40 * MIB)
    target = start("--allowed-source", str(source), adapters=["upper-ia3"])
    staging = tmp_path / "store-0" / "staging"
    sizes: list[int] = []
    ends = threading.Event()

    def measure() -> None:
        while not ends.wait(0.02):
            sizes.append(sum(path.stat().st_size for path in staging.rglob("*.safetensors") if path.exists()))

    measuring = threading.Thread(target=measure)
    measuring.start()
    try:
        outcomes = together(
            [
                lambda number=number: outcome(
                    lambda: target.client.register(f"flood-{number}", source, validate_only=True)
                )
                for number in range(70)
            ]
        )
        target.client.unload("upper-ia3")
        target.client.generate("upper-ia3", 2, text="hello world")
    finally:
        ends.set()
        measuring.join()
    assert set(outcomes) <= {"INVALID_ARGUMENT/HEADER_INVALID", "RESOURCE_EXHAUSTED/CALLS_FULL"}
    assert outcomes.count("RESOURCE_EXHAUSTED/CALLS_FULL") <= 70 - ServerConfig().register_calls_max
    assert max(sizes) <= 3 * 40 * MIB


def test_t15_trickled_uploads_keep_nobody_out(start: Start) -> None:
    """Row 106. Before: two uploads of 4 kB a second kept all others waiting, for a day and a half."""
    target = start()
    config = (DEMO_ADAPTERS / "upper-lora" / PEFT_FILES.config).read_bytes()
    size = 512 * MIB

    def trickle() -> Iterator[adapter_service_pb2.UploadAdapterRequest]:
        digests = (hashlib.sha256(config).hexdigest(), "0" * 64)
        files = [
            adapter_service_pb2.UploadFile(name=name, size_bytes=num_bytes, sha256=digest)
            for name, num_bytes, digest in zip(PEFT_FILES, (len(config), size), digests, strict=True)
        ]
        header = adapter_service_pb2.UploadHeader(adapter_id="trickle", files=files)
        yield adapter_service_pb2.UploadAdapterRequest(header=header)
        chunk = adapter_service_pb2.UploadChunk
        yield adapter_service_pb2.UploadAdapterRequest(chunk=chunk(file_index=0, offset=0, data=config))
        for offset in range(0, size, 2048):
            yield adapter_service_pb2.UploadAdapterRequest(chunk=chunk(file_index=1, offset=offset, data=bytes(2048)))
            time.sleep(0.5)

    trickles = [
        threading.Thread(target=lambda: ends.append(outcome(lambda: target.client.upload(trickle())))) for _ in "ab"
    ]
    ends: list[str] = []
    for thread in trickles:
        thread.start()
    time.sleep(1)
    for number in range(3):
        target.client.upload(upload_messages(f"honest-{number}", _files("upper-lora")))
    for thread in trickles:
        thread.join(WAIT_S)
    assert ends == ["DEADLINE_EXCEEDED/UPLOAD_STALLED"] * 2


def test_t3_streams_that_nobody_reads_end(start: Start) -> None:
    """Row 104, at default limits but for the time of a write. Before: none of 480 calls ever ended."""
    target = start("--stream-write-timeout-s", "3", adapters=["reverse-lora"])
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    request = target.client.request(
        "reverse-lora",
        text="hello world",
        stopping=generation_pb2.Stopping(max_new_tokens=480, ignore_eos=True),
        options=generation_pb2.ResponseOptions(token_ids=True, logprobs=5),
    )
    channels = [grpc.insecure_channel(f"127.0.0.1:{target.port}", options=options) for _ in range(2)]
    stub = type(target.client.generation)
    with target.sampled() as samples:
        streams = [stub(channel).StreamGenerate(request) for channel in channels for _ in range(20)]
        wait_until(lambda: target.metric("weft_rpcs_total", rpc="StreamGenerate") == len(streams))
    assert target.metric("weft_rpcs_total", rpc="StreamGenerate", code="DEADLINE_EXCEEDED") == len(streams)
    assert target.metric("weft_requests_total") == len(streams)
    assert samples.peak.rss_mib - samples.memory[0].rss_mib < 100
    target.client.generate("reverse-lora", 2, text="hello world")
    refused(lambda: list(streams[0]), "DEADLINE_EXCEEDED", "STREAM_STALLED", retry=False)  # a late reader is told
    for channel in channels:
        channel.close()


def test_t12_idle_connections_leave_descriptors_for_the_rest(start: Start) -> None:
    """Row 107. Before: 1,010 idle connections to the metrics port made 1,023 threads, and gRPC stopped."""
    target = start("--log-level", "warning", adapters=["reverse-lora", "upper-ia3"], max_files=1024)
    assert target.is_serving()  # connects the client
    before = target.memory()
    ports = (target.metrics_port, target.port)
    idle = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(1100)]
    time.sleep(1)
    assert target.memory().num_threads < before.num_threads + 80
    target.client.generate("reverse-lora", 2, text="hello world")
    target.client.unload("upper-ia3")
    target.client.generate("upper-ia3", 2, text="hello world")
    target.client.upload(upload_messages("new", _files("upper-lora")))
    target.client.unregister("new")
    assert target.is_serving()
    # The connections are closed for their clients, the last when their time is over, so that others have room again.
    for connection in idle:
        connection.settimeout(WAIT_S)
        while connection.recv(4096):
            pass
        connection.close()
    wait_until(lambda: outcome(lambda: target.connect().generate("reverse-lora", 2, text="hello world")) == "OK")
    assert target.metric("weft_requests_total") > 0
    assert target.memory().num_descriptors <= before.num_descriptors + 16


def test_t2_a_victim_under_bombs_is_answered(start: Start) -> None:
    """Before: 2 answers in 20 s, each after 12 to 25 s."""
    target = start(adapters=["reverse-lora"])
    [bomb] = [
        bomb for bomb in wire.bombs(ServerConfig().receive_bytes_max - 300) if str(bomb) == "Generate-steering.bounds"
    ]
    attacker, ends = target.connect(), threading.Event()
    num_bombs = 0

    def attack() -> None:
        nonlocal num_bombs
        call = attacker.channel.unary_unary(bomb.method.path)
        while not ends.is_set():
            assert outcome(lambda: call(bomb.data, timeout=WAIT_S)) == "INVALID_ARGUMENT/STEERING_INVALID"
            num_bombs += 1

    with target.sampled() as samples:
        attacking = threading.Thread(target=attack)
        attacking.start()
        answers = [target.client.tokens("reverse-lora", 16, text="hello world") for _ in range(10)]
        ends.set()
        attacking.join()
    assert all(answer == answers[0] for answer in answers)
    assert num_bombs >= 10
    assert samples.peak.rss_mib - samples.memory[0].rss_mib < 300


def test_a_signal_during_the_start_is_obeyed(start: Start, tmp_path: Path) -> None:
    """Before: SIGTERM while the store was restored was obeyed once the server had said that it was ready."""
    target = start()
    target.process.send_signal(signal.SIGTERM)
    assert target.process.wait(WAIT_S) == 0
    assert "Traceback" not in target.log
