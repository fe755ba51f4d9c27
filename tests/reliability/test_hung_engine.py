"""An engine thread that hangs or is gone: the server says so, ends what it had accepted, and exits with code 1."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from tests.reliability import hanging
from tests.reliability.pair import BASE, DEMO, source
from tests.server.live import WAIT_S, LiveServer, Loop, refused, wait_until
from tests.server.test_serve_process import Nursery, ServerProcess
from weft.config import EngineConfig, ModelConfig, ServerConfig, WeftConfig
from weft.kernels.step import Step
from weft.v1 import generation_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
TIMEOUT_S = 1.0
LATE_S = 1.0  # after the bound, until the server says that it does not serve


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def live(loop: Loop, tmp_path: Path) -> Iterator[LiveServer]:
    """Yield a server that a test may bring down."""
    config = WeftConfig(
        model=ModelConfig(path=BASE, device="cpu", num_threads=1),
        engine=EngineConfig(max_num_seqs=2, step_timeout_s=TIMEOUT_S, stream_interval_s=0.0),
        store=tmp_path / "store",
        allowed_sources=(DEMO,),
        server=ServerConfig(port=0, metrics_port=0),
    )
    server = LiveServer(loop, config, [("lora", source("upper-lora")), ("ia3", source("upper-ia3"))])
    server.client.tokens("lora", 2)  # what comes only with the first steps
    yield server
    server.gate.open()
    server.stop()


def serves(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S).status == SERVING


def seconds_until_down(live: LiveServer) -> float:
    begin_s = time.monotonic()
    wait_until(lambda: not serves(live.serving.port))
    return time.monotonic() - begin_s


def num_ended(live: LiveServer) -> float:
    return sum(s.value for s in live.scrape()["weft_requests"].samples if s.name.endswith("_total"))


def test_a_hung_step_ends_every_request_once_and_late_events_are_ignored(live: LiveServer) -> None:
    """T23."""
    client, before = live.client, num_ended(live)
    refusals: list[Callable[[], object]] = []
    with live.gate.held(), ThreadPoolExecutor() as threads:
        begin_s = time.monotonic()
        for index in range(5):  # two run, three wait
            refusals.append(client.stream("lora" if index % 2 else None, 40, text=f"{index} hello").result)
        pinned = threads.submit(client.load, "ia3", pin=True)  # a call that only the engine can answer
        unary = threads.submit(client.generate, None, 40, timeout=None)
        wait_until(lambda: live.application.requests.admission.num_requests == 6)
        wait_until(lambda: not serves(live.serving.port))
        took_s = time.monotonic() - begin_s
        for call in (*refusals, unary.result, pinned.result):
            refused(call, "UNAVAILABLE", "ENGINE_DOWN", "another replica", retry=True)
        for call in (client.generate, lambda: client.load("ia3", pin=True)):
            refused(call, "UNAVAILABLE", "ENGINE_DOWN", retry=True)
        assert live.application.requests.admission.num_requests == 0
        assert not any(version.leases for version in live.application.lifecycle.registry)
        assert num_ended(live) == before + 6
        assert TIMEOUT_S <= took_s < TIMEOUT_S + LATE_S + 0.5, "half a second to set this up"
    engine = live.application.engine
    engine._thread.join(WAIT_S)  # the gate is open: the thread wakes up
    assert not engine._thread.is_alive()
    assert num_ended(live) == before + 6
    assert not serves(live.serving.port)
    begin_s = time.monotonic()
    live.begin_stop().result(WAIT_S)
    assert time.monotonic() - begin_s < 5.0


def test_a_thread_that_hangs_with_nothing_to_do_is_seen(live: LiveServer) -> None:
    released = threading.Event()
    live.application._inbox.post(released.wait)
    assert seconds_until_down(live) < TIMEOUT_S + LATE_S
    refused(live.client.generate, "UNAVAILABLE", "ENGINE_DOWN", retry=True)
    released.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_gone_is_seen_at_once(live: LiveServer) -> None:
    def die() -> None:
        raise SystemExit

    live.application._inbox.post(die)
    assert seconds_until_down(live) < LATE_S
    refused(live.client.generate, "UNAVAILABLE", "ENGINE_DOWN", retry=True)


def test_an_engine_that_fails_every_step_is_down_like_a_hung_one(live: LiveServer) -> None:
    """T22 (b)."""

    def fail(step: Step) -> Tensor:
        raise RuntimeError("a kernel failed")

    live.runner.forward = fail
    reasons = []
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as raised:
            live.client.generate()
        reasons.append(raised.value.details())
    assert sum("step failed" in text for text in reasons) == 8
    wait_until(lambda: not serves(live.serving.port))


def test_slow_steps_are_no_hang(live: LiveServer) -> None:
    """A negative control: each step is within the bound, all of them together are not."""
    real, slow_s = live.runner.forward, 0.6 * TIMEOUT_S

    def forward(step: Step) -> Tensor:
        time.sleep(slow_s)
        if step.num_rows > 1 and len(step.paging.context_lens) > 1:
            raise RuntimeError("it is computed again in halves")
        return real(step)

    live.runner.forward = forward
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(live.client.tokens, None, 2) for _ in range(2)]
        begin_s = time.monotonic()
        while not all(answer.done() for answer in answers):
            assert serves(live.serving.port)
            time.sleep(0.1)
        assert time.monotonic() - begin_s > 2 * TIMEOUT_S
    assert [len(answer.result()) for answer in answers] == [2, 2]


@pytest.fixture
def hanging_server(forge: Nursery, tmp_path: Path) -> Iterator[ServerProcess]:
    arguments = [str(BASE), "--port", "0", "--metrics-port", "0", "--device", "cpu", "--num-threads", "1"]
    arguments += ["--store", str(tmp_path / "store"), "--step-timeout-s", str(TIMEOUT_S)]
    server = ServerProcess(forge, tmp_path / "log", arguments, first=Path(hanging.__file__))
    server.wait_ready()
    yield server
    server.end()


def test_the_process_exits_with_code_1_without_waiting_for_the_thread(hanging_server: ServerProcess) -> None:
    client = hanging_server.client
    good = client.stream(None, stopping=generation_pb2.Stopping(max_new_tokens=400, ignore_eos=True))
    good.wait_tokens(1)
    hung = client.stream(None, 8, token_ids={"ids": [65, hanging.MARK, 65]})
    begin_s = time.monotonic()
    assert hanging_server.exit_code() == 1
    assert time.monotonic() - begin_s < TIMEOUT_S + LATE_S + 5.0
    for stream in (good, hung):
        refused(stream.result, "UNAVAILABLE", "ENGINE_DOWN", retry=True)
    assert "step_timeout_s" in hanging_server.log
    assert "in hang" in hanging_server.log, "the log shows where the thread is"
