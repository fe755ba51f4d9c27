"""Real servers in this process, and a client that calls them as others do: over a channel, with statuses."""

import asyncio
import itertools
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import grpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from weft.adapters.identifiers import AdapterId
from weft.api.serve import Serving, build_model, serving
from weft.client.failure import Failure, failure_of
from weft.config import WeftConfig
from weft.engine.runner import ModelRunner
from weft.kernels.step import Step
from weft.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
)
from weft.v1.status_details import DETAILS_KEY, DOMAIN

PROMPT = "The quick brown fox jumps over"
WAIT_S = 60.0  # after which a test reports a hang
T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own, for all servers of a session."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        """The thread's identifier, for its clock."""
        assert self._thread.ident is not None
        return self._thread.ident

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(WAIT_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


class Computed(NamedTuple):
    """The content of one model call."""

    num_rows: int
    num_requests: int
    num_adapters: int


class Gate:
    """A gate between the engine and the model: it counts the steps, and can make each of them wait for permission."""

    def __init__(self, runner: ModelRunner) -> None:
        self._forward = runner.forward
        self._slots = runner.slots
        self._condition = threading.Condition()
        self._allowed: int | None = None  # None: any number
        self._waiting = False
        self.steps: list[Computed] = []
        self.fault: Exception | None = None  # raised instead of the next step
        runner.forward = self.forward

    def forward(self, step: Step) -> Tensor:
        with self._condition:
            self._waiting = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._allowed != 0)
            self._waiting = False
            if self._allowed is not None:
                self._allowed -= 1
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        taken = set() if step.entries is None else set(step.entries.slots.tolist())
        num_adapters = sum(number in self._slots for number in taken)
        self.steps.append(Computed(step.num_rows, len(step.paging.context_lens), num_adapters))
        return self._forward(step)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, hold back all steps except those that `let` allows."""
        with self._condition:
            self._allowed = 0
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        """Let the engine run freely again."""
        with self._condition:
            self._allowed = None
            self._condition.notify_all()

    def let(self, num_steps: int) -> None:
        """Let the engine take this many steps, and return when it waits to take another."""
        with self._condition:
            self._allowed = num_steps
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: self._waiting and self._allowed == 0, WAIT_S), "no further step"


class Answer(NamedTuple):
    """A finished answer."""

    tokens: list[int]
    text: str
    finish: generation_pb2.Finish

    @property
    def digest(self) -> str:
        """The digest of the one adapter that took part, or ""."""
        return self.finish.effective_adapters[0].digest if self.finish.effective_adapters else ""


class Running:
    """A stream that a thread is reading."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._parts: list[generation_pb2.StreamGenerateResponse] = []
        self._condition = threading.Condition()
        self._error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for part in self._call:
                with self._condition:
                    self._parts.append(part)
                    self._condition.notify_all()
        except grpc.RpcError as error:
            self._error = error

    @property
    def tokens(self) -> list[int]:
        return [token for part in self._parts for token in part.delta.token_ids]

    def wait_tokens(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.tokens) >= count, WAIT_S), f"{len(self.tokens)} tokens"

    def cancel(self) -> None:
        self._call.cancel()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Answer:
        """Return the answer, or raise the error that ended it."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the stream hangs"
        if self._error is not None:
            raise self._error
        return Answer(self.tokens, "".join(part.delta.text for part in self._parts), self._parts[-1].finish)


class Client:
    """The calls, with defaults for tests: greedy, token ids in the answer, a deadline."""

    def __init__(self, port: int, options: Sequence[tuple[str, Any]] = ()) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        self.generation = generation_service_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters = adapter_service_pb2_grpc.AdapterServiceStub(self.channel)

    def request(
        self, adapter_id: str | None = None, num_tokens: int = 8, **fields: Any
    ) -> generation_pb2.GenerateRequest:
        if not fields.keys() & {"text", "token_ids", "messages"}:
            fields["text"] = PROMPT
        fields.setdefault("sampling", generation_pb2.Sampling(temperature=0))
        fields.setdefault("stopping", generation_pb2.Stopping(max_new_tokens=num_tokens))
        fields.setdefault("options", generation_pb2.ResponseOptions(token_ids=True))
        request = generation_pb2.GenerateRequest(**fields)
        if adapter_id is not None:
            request.adapter_id = adapter_id
        return request

    def generate(
        self, adapter_id: str | None = None, num_tokens: int = 8, *, timeout: float | None = WAIT_S, **fields: Any
    ) -> Answer:
        response = self.generation.Generate(self.request(adapter_id, num_tokens, **fields), timeout=timeout)
        return Answer(list(response.token_ids), response.text, response.finish)

    def tokens(self, adapter_id: str | None = None, num_tokens: int = 8, **fields: Any) -> list[int]:
        return self.generate(adapter_id, num_tokens, **fields).tokens

    def stream(self, adapter_id: str | None = None, num_tokens: int = 8, **fields: Any) -> Running:
        request = self.request(adapter_id, num_tokens, **fields)
        return Running(self.generation.StreamGenerate(request, timeout=WAIT_S))

    def register(
        self, adapter_id: str, source: str | Path, **fields: Any
    ) -> adapter_service_pb2.RegisterAdapterResponse:
        request = adapter_service_pb2.RegisterAdapterRequest(adapter_id=adapter_id, source=str(source), **fields)
        return self.adapters.RegisterAdapter(request, timeout=WAIT_S)

    def upload(self, messages: Iterable[Any], timeout: float = WAIT_S) -> adapter_service_pb2.UploadAdapterResponse:
        return self.adapters.UploadAdapter(iter(messages), timeout=timeout)

    def unregister(self, adapter_id: str, **fields: Any) -> adapter_service_pb2.UnregisterAdapterResponse:
        request = adapter_service_pb2.UnregisterAdapterRequest(adapter_id=adapter_id, **fields)
        return self.adapters.UnregisterAdapter(request, timeout=WAIT_S)

    def get(self, adapter_id: str) -> adapter_pb2.Adapter:
        request = adapter_service_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return self.adapters.GetAdapter(request, timeout=WAIT_S).adapter

    def list(self, **fields: Any) -> adapter_service_pb2.ListAdaptersResponse:
        return self.adapters.ListAdapters(adapter_service_pb2.ListAdaptersRequest(**fields), timeout=WAIT_S)

    def load(self, adapter_id: str, **fields: Any) -> adapter_pb2.Adapter:
        request = adapter_service_pb2.LoadAdapterRequest(adapter_id=adapter_id, **fields)
        return self.adapters.LoadAdapter(request, timeout=WAIT_S).adapter

    def unload(self, adapter_id: str, **fields: Any) -> adapter_pb2.Adapter:
        request = adapter_service_pb2.UnloadAdapterRequest(adapter_id=adapter_id, **fields)
        return self.adapters.UnloadAdapter(request, timeout=WAIT_S).adapter

    def lift(self, adapter_id: str, **fields: Any) -> adapter_pb2.Adapter:
        request = adapter_service_pb2.LiftQuarantineRequest(adapter_id=adapter_id, **fields)
        return self.adapters.LiftQuarantine(request, timeout=WAIT_S).adapter

    def tokenize(self, **fields: Any) -> Sequence[int]:
        return self.generation.Tokenize(generation_service_pb2.TokenizeRequest(**fields), timeout=WAIT_S).token_ids


class LiveServer:
    """A server that listens until `stop`."""

    def __init__(self, loop: Loop, config: WeftConfig, adapters: Sequence[tuple[str, Path]] = ()) -> None:
        self.loop = loop
        self.config = config
        self.model, self.runner = build_model(config)
        self.gate = Gate(self.runner)
        self._end = asyncio.Event()
        started: Future[Serving] = Future()
        self._life = loop.start(self._live([(AdapterId(name), path) for name, path in adapters], started))
        self._life.add_done_callback(lambda life: None if started.done() else started.set_exception(life.exception()))
        self.serving = started.result(WAIT_S)
        self.application = self.serving.application
        self.client = Client(self.serving.port)
        self._answers: dict[str | None, list[int]] = {}
        self._turns = itertools.count()

    async def _live(self, adapters: list[tuple[AdapterId, Path]], started: "Future[Serving]") -> None:
        async with serving(self.config, self.model, self.runner, adapters) as served:
            started.set_result(served)
            await self._end.wait()

    def begin_stop(self) -> "Future[None]":
        """Drain and stop the server; the future ends when it is gone."""

        async def end() -> None:
            self._end.set()

        self.loop.run(end())
        return self._life

    def stop(self) -> None:
        self.begin_stop().result(WAIT_S)
        self.client.channel.close()

    def watch_well(self, adapters: Iterable[str | None]) -> None:
        """Remember the current answers of these, for `check_well`."""
        self._answers = {adapter_id: self.client.tokens(adapter_id, 4) for adapter_id in adapters}
        distinct = {tuple(tokens) for tokens in self._answers.values()}
        assert len(distinct) == len(self._answers), "a wrong adapter could not be told from the right one"

    def check_well(self) -> None:
        """Check that a good request still gets exactly its earlier answer; each call uses another adapter."""
        adapter_id = list(self._answers)[next(self._turns) % len(self._answers)]
        assert self.client.tokens(adapter_id, 4) == self._answers[adapter_id], adapter_id

    def staging(self) -> list[str]:
        """Return the remains of uploads and registrations."""
        return sorted(path.name for path in (self.config.store / "staging").iterdir())

    def scrape(self) -> dict[str, Metric]:
        """Return the metrics by name, as Prometheus gets them."""
        url = f"http://127.0.0.1:{self.serving.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT_S) as response:
            text = response.read().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def wait_idle(self) -> None:
        """Wait until no request is inside, and the engine has finished the last step for one."""
        engine = self.application.engine
        wait_until(lambda: self.application.requests.admission.num_requests == 0 and not engine.scheduler.running)

    def kv_blocks_used(self) -> int:
        blocks = self.application.engine.blocks
        return blocks.num_used_blocks


def _details_of(error: Any) -> object:
    return dict(error.trailing_metadata() or ()).get(DETAILS_KEY)


def refused(call: Callable[[], object], code: str, reason: str, *says: str, retry: bool | None = None) -> Failure:
    """Check that `call` ends with this status, in the form of every error of Weft; return the client's error."""
    try:
        result = call()
        if isinstance(result, Running):
            result = result.result()
    except grpc.RpcError as error:
        failure, packed = failure_of(error), _details_of(error)
    else:
        raise AssertionError(f"expected {code} {reason}, was answered {str(result)[:300]}")
    found = (failure.code.name, failure.reason, failure.message)
    assert found[:2] == (code, reason), found
    for text in says:
        assert text in failure.message, found
    assert isinstance(packed, bytes), found
    details = {detail.TypeName(): detail for detail in Status.FromString(packed).details}
    infos = [detail for detail in Status.FromString(packed).details if detail.TypeName() == "google.rpc.ErrorInfo"]
    assert len(infos) == 1, found
    assert error_details_pb2.ErrorInfo.FromString(infos[0].value).domain == DOMAIN
    assert ("google.rpc.RetryInfo" in details) == (failure.retry_after_s is not None)
    if retry is not None:
        assert (failure.retry_after_s is not None) is retry, found
    if code == "RESOURCE_EXHAUSTED":
        assert "google.rpc.QuotaFailure" in details, found
    if code == "INVALID_ARGUMENT":
        assert "google.rpc.BadRequest" in details, found
    for leak in ("Traceback", "/tmp", ".py", "0x7f"):
        assert leak not in failure.message, found
    assert failure.message.isprintable(), found
    return failure


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that becomes true by itself."""
    give_up_at = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at, "it does not come about"
        time.sleep(0.002)
