"""Errors on the wire: each arrives as raised, nothing else leaks, and a client reads it back."""

import asyncio
import base64
import inspect
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from weft import errors
from weft.api.interceptors import FinishedCall, StatusInterceptor
from weft.api.status import status_of, trailing_metadata
from weft.client.failure import Failure, failure_of
from weft.errors import Code, InvalidRequest, WeftError
from weft.v1 import generation_pb2
from weft.v1.status_details import DETAILS_KEY

CANARY = "canary-5f2c"
SERVICE = "weft.test.Calls"
KINDS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
STREAMING = ("UnaryStream", "StreamStream")
ERROR_CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, WeftError)]
TRAILER_BYTES_MAX = 8 * 1024

Answer = Callable[[], Awaitable[None]]
Context = grpc.aio.ServicerContext


def of_class(kind: type[WeftError]) -> WeftError:
    """Return an error of `kind` with every attribute set."""
    return kind(
        f"{kind.__name__.upper()}_REASON",
        f"adapter_id: broken by {kind.__name__}, 100 % näive, given 'x'",
        field="adapter_id",
        metadata={"adapter_id": "lora-a", "limit": 63, "given": "x", "quota": "queue", "subject": "tenant"},
        retry_after_s=1.25,
    )


async def nothing() -> None:
    """Answers OK."""


def raises(error: BaseException) -> Answer:
    async def answer() -> None:
        raise error

    return answer


class Calls(grpc.GenericRpcHandler):
    """A servicer with one method of each kind; `before` and `after` run before and after the first streamed message."""

    def __init__(self, *, before: Answer = nothing, unary: Any = None) -> None:
        self.before = before
        self.after: Answer = nothing
        self.response: Callable[..., Message | None] = generation_pb2.GenerateResponse
        self.unary: Any = unary or self.answer_once
        self.stream: Any = self.answer_twice
        self.closed = asyncio.Event()

    async def answer_once(self, request: Message, context: Context) -> Message | None:
        try:
            await self.before()
            await self.after()
            return self.response(text="whole")
        finally:
            self.closed.set()

    async def answer_twice(self, request: Message, context: Context) -> AsyncIterator[Message]:
        try:
            await self.before()
            yield self.response(text="first")
            await self.after()
            yield self.response(text="last")
        finally:
            self.closed.set()

    async def answer_a_stream_once(self, requests: AsyncIterator[Message], context: Context) -> Message:
        async for _ in requests:
            pass
        return await self.unary(generation_pb2.GenerateRequest(), context)

    async def answer_a_stream_by_writing(self, requests: AsyncIterator[Message], context: Context) -> None:
        """The other form of a streaming handler: a coroutine that writes."""
        async for _ in requests:
            pass
        async for message in self.stream(generation_pb2.GenerateRequest(), context):
            await context.write(message)

    def service(self, call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Looks the handler up at each call, so that a test can put another in its place."""
        parse = generation_pb2.GenerateRequest.FromString
        serialize = generation_pb2.GenerateResponse.SerializeToString
        match call_details.method.removeprefix(f"/{SERVICE}/"):
            case "UnaryUnary":
                return grpc.unary_unary_rpc_method_handler(self.unary, parse, serialize)
            case "UnaryStream":
                return grpc.unary_stream_rpc_method_handler(self.stream, parse, serialize)
            case "StreamUnary":
                return grpc.stream_unary_rpc_method_handler(self.answer_a_stream_once, parse, serialize)
            case "StreamStream":
                return grpc.stream_stream_rpc_method_handler(self.answer_a_stream_by_writing, parse, serialize)
            case _:
                return None


@dataclass
class Rig:
    """A server on a free port, a channel to it, and the reports of its interceptor."""

    calls: Calls
    server: grpc.aio.Server
    address: str
    channel: grpc.aio.Channel
    finished: asyncio.Queue[FinishedCall]

    def start(self, kind: str, request: bytes = b"", timeout_s: float | None = 10) -> grpc.aio.Call:
        """A call of one kind with raw bytes as its request, or as its only one."""
        path = f"/{SERVICE}/{kind}"
        match kind:
            case "UnaryUnary":
                return self.channel.unary_unary(path)(request, timeout=timeout_s)
            case "UnaryStream":
                return self.channel.unary_stream(path)(request, timeout=timeout_s)
            case "StreamUnary":
                return self.channel.stream_unary(path)(iter([request]), timeout=timeout_s)
            case _:
                return self.channel.stream_stream(path)(iter([request]), timeout=timeout_s)

    async def outcome(self, kind: str, request: bytes = b"") -> tuple[list[str], grpc.aio.AioRpcError | None]:
        """Texts that arrived, and the error that ended the call."""
        call = self.start(kind, request)
        texts: list[str] = []
        try:
            if kind in STREAMING:
                async for message in call:
                    texts.append(generation_pb2.GenerateResponse.FromString(message).text)
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return texts, error
        return texts, None

    async def next_finished(self) -> FinishedCall:
        async with asyncio.timeout(5):
            return await self.finished.get()


@asynccontextmanager
async def serving(
    calls: Calls, *interceptors: grpc.aio.ServerInterceptor
) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    """A server on a free port, and its address."""
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((calls,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    calls, finished = Calls(), asyncio.Queue[FinishedCall]()
    async with (
        serving(calls, StatusInterceptor(finished.put_nowait)) as (server, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield Rig(calls, server, address, channel, finished)


def details(status: Status) -> dict[str, Message]:
    """Return the details of a status by the short name of their kind; each may occur once."""
    unpacked: dict[str, Message] = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().removeprefix("google.rpc."))()
        assert packed.Unpack(message)
        assert unpacked.setdefault(message.DESCRIPTOR.name, message) is message
    return unpacked


def failure(error: WeftError) -> Failure:
    """Return the failure that a client should read from `error`."""
    return Failure(
        code=grpc.StatusCode[error.code],
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
    )


def raised_by_client(error: WeftError, **changes: object) -> grpc.aio.AioRpcError:
    """Return the exception that a client would raise for `error`, without a server."""
    status = status_of(error)
    fields: dict[str, object] = {
        "code": grpc.StatusCode[error.code],
        "initial_metadata": grpc.aio.Metadata(),
        "trailing_metadata": grpc.aio.Metadata(*trailing_metadata(status)),
        "details": status.message,
    }
    return grpc.aio.AioRpcError(**(fields | changes))


def documented_tree(text: str) -> dict[str, tuple[str, str]]:
    """Return class → (parent, code) from the drawing in a docstring."""
    tree: dict[str, tuple[str, str]] = {}
    ancestors = ["WeftError"]
    for line in text.splitlines():
        if match := re.match(r" {4}((?:[│ ] {3})*)[├└]── (\w+) +([A-Z_]+) +\S", line):
            depth = len(match[1]) // 4 + 1
            del ancestors[depth:]
            tree[match[2]] = (ancestors[-1], match[3])
            ancestors.append(match[2])
    return tree


# The tree of errors


def test_the_docstring_draws_every_class_with_its_parent_and_code():
    classes = [kind for kind in ERROR_CLASSES if kind is not WeftError]
    assert documented_tree(errors.__doc__ or "") == {
        kind.__name__: (kind.__base__.__name__, kind.code) for kind in classes
    }


def test_a_change_of_the_drawing_is_seen():
    text = errors.__doc__ or ""
    tree = documented_tree(text)
    assert documented_tree(text.replace("    ├── AdapterExists", "    ├── AdapterTaken")) != tree
    assert documented_tree(text.replace("│   └── InvalidAdapter", "├── InvalidAdapter")) != tree
    assert documented_tree(text.replace("DATA_LOSS  ", "INTERNAL   ")) != tree


@pytest.mark.parametrize("code", list(Code))
def test_every_code_is_one_of_grpc_with_the_same_number(code: Code):
    assert grpc.StatusCode[code].value[0] == code_pb2.Code.Value(code)


# Statuses


@pytest.mark.parametrize("kind", ERROR_CLASSES)
def test_details_are_those_that_the_code_calls_for(kind: type[WeftError]):
    error = of_class(kind)
    found = details(status_of(error))
    info = found.pop("ErrorInfo")
    assert (info.reason, info.domain, dict(info.metadata)) == (error.reason, "weft", error.metadata)
    assert found.pop("RetryInfo").retry_delay.ToTimedelta().total_seconds() == 1.25
    if kind.code is Code.INVALID_ARGUMENT:
        [violation] = found.pop("BadRequest").field_violations
        assert (violation.field, violation.reason) == ("adapter_id", error.reason)
        assert violation.description == error.message
    if kind.code is Code.RESOURCE_EXHAUSTED:
        [violation] = found.pop("QuotaFailure").violations
        assert (violation.subject, violation.quota_id) == ("tenant", "queue")
    if kind.code is Code.NOT_FOUND:
        resource = found.pop("ResourceInfo")
        assert (resource.resource_type, resource.resource_name) == ("weft.v1.Adapter", "lora-a")
    assert found == {}


@pytest.mark.parametrize("kind", ERROR_CLASSES)
def test_an_error_without_parts_has_error_info_only(kind: type[WeftError]):
    assert details(status_of(kind("R", "text"))).keys() == {"ErrorInfo"}


@pytest.mark.parametrize(("metadata", "subject", "quota"), [({"quota": "q"}, "", "q"), ({"subject": "s"}, "s", "")])
def test_a_quota_needs_only_one_of_its_names(metadata: dict[str, object], subject: str, quota: str):
    [violation] = details(status_of(errors.Overloaded("R", "full", metadata=metadata)))["QuotaFailure"].violations
    assert (violation.subject, violation.quota_id) == (subject, quota)


def test_google_reads_our_statuses():
    error = of_class(InvalidRequest)
    status = status_of(error)
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert rpc_status.to_status(status).trailing_metadata == trailing_metadata(status)


def any_error(texts: st.SearchStrategy[str], num_entries: int, retry_s: st.SearchStrategy[float]):
    return st.builds(
        lambda kind, message, field, metadata, retry_after_s: kind(
            "REASON", message, field=field, metadata=metadata, retry_after_s=retry_after_s
        ),
        st.sampled_from(ERROR_CLASSES),
        texts,
        texts,
        st.dictionaries(texts, texts, max_size=num_entries),
        st.none() | retry_s,
    )


# Lone surrogates and control characters included; the other strategy has what fits uncut.
hostile = any_error(st.text(st.characters(), max_size=2_000), 40, st.floats(min_value=0, allow_nan=False))
ordinary = any_error(st.text(st.characters(codec="ascii"), max_size=64), 15, st.floats(0, 86_400))


def trailer_bytes(error: WeftError) -> int:
    """Return the bytes of the status on the wire: percent-encoded text, base64 details, and HTTP/2's 32 per header."""
    status = status_of(error)
    text = quote(status.message, safe="".join(map(chr, range(0x20, 0x7F))).replace("%", ""))
    packed = base64.b64encode(trailing_metadata(status)[0][1])
    headers = [("grpc-status", b"16"), ("grpc-message", text.encode()), (DETAILS_KEY, packed)]
    return sum(len(name) + len(value) + 32 for name, value in headers)


@given(hostile)
def test_any_error_becomes_a_status_below_the_limit(error: WeftError):
    assert trailer_bytes(error) <= TRAILER_BYTES_MAX
    back = failure_of(raised_by_client(error))
    assert (back.code, back.reason) == (grpc.StatusCode[error.code], "REASON")
    assert (back.retry_after_s is None) == (error.retry_after_s is None)


def worst_error() -> WeftError:
    return InvalidRequest(
        "REASON" * 100,
        "ü%" * 1_000_000,
        field="f" * 1_000_000,
        metadata={f"{i:03}" + "ü" * 1000: "x" * 1000 for i in range(1000)},
        retry_after_s=float("inf"),
    )


def test_the_worst_error_is_cut_and_says_so():
    error = worst_error()
    assert 4096 < trailer_bytes(error) <= TRAILER_BYTES_MAX
    found = details(status_of(error))
    assert status_of(error).message.endswith("…")
    assert found["BadRequest"].field_violations[0].field.endswith("…")
    assert len(found["ErrorInfo"].metadata) == 16


async def test_the_worst_error_arrives(rig: Rig):
    rig.calls.before = raises(worst_error())
    rig.channel = grpc.aio.insecure_channel(rig.address, options=[("grpc.max_metadata_size", TRAILER_BYTES_MAX)])
    async with rig.channel:
        _, error = await rig.outcome("UnaryUnary")
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure_of(error).retry_after_s == 86_400


async def test_a_status_over_the_limit_would_not_arrive(rig: Rig):
    """Negative control of the test above: the client's limit is real."""

    async def abort(request: Message, context: Context) -> None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "x", ((DETAILS_KEY, b"x" * 4 * TRAILER_BYTES_MAX),))

    options = [("grpc.max_metadata_size", TRAILER_BYTES_MAX)]
    async with (
        serving(Calls(unary=abort)) as (_, address),
        grpc.aio.insecure_channel(address, options=options) as rig.channel,
    ):
        _, error = await rig.outcome("UnaryUnary")
    assert error is not None
    assert error.code() is not grpc.StatusCode.INVALID_ARGUMENT


# Reading back


@given(ordinary)
def test_reading_back_is_faithful(error: WeftError):
    back = failure_of(raised_by_client(error))
    assert (back.code, back.reason) == (grpc.StatusCode[error.code], error.reason)
    assert (back.message, back.metadata) == (error.message, error.metadata)
    assert back.retry_after_s == pytest.approx(error.retry_after_s, abs=1e-9)


@pytest.mark.parametrize(
    "trailers",
    [
        grpc.aio.Metadata(),
        grpc.aio.Metadata((DETAILS_KEY, b"\xff\xff\xff")),
        grpc.aio.Metadata((DETAILS_KEY, b"")),
        grpc.aio.Metadata(*trailing_metadata(status_of(errors.Unavailable("DRAINING", "draining")))),
        None,
    ],
    ids=["none", "garbage", "empty", "another code", "missing"],
)
def test_a_status_that_is_not_ours_has_no_reason(trailers: grpc.aio.Metadata | None):
    error = raised_by_client(errors.DataLoss("BLOB_CORRUPT", "text"), trailing_metadata=trailers)
    assert failure_of(error) == Failure(
        code=grpc.StatusCode.DATA_LOSS, reason="", message="text", metadata={}, retry_after_s=None
    )


def test_a_reason_of_another_domain_is_not_ours():
    status = status_of(errors.Unavailable("DRAINING", "text"))
    foreign = Status(code=status.code, message=status.message)
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="RATE_LIMITED", domain="proxy.example"))
    trailers = grpc.aio.Metadata(*trailing_metadata(foreign))
    assert failure_of(raised_by_client(errors.Unavailable("", "text"), trailing_metadata=trailers)).reason == ""


def test_a_detail_of_garbage_is_no_reason():
    status = status_of(errors.Unavailable("DRAINING", "text"))
    status.details[0].value = b"\xff\xff"
    trailers = grpc.aio.Metadata(*trailing_metadata(status))
    assert failure_of(raised_by_client(errors.Unavailable("", "text"), trailing_metadata=trailers)).reason == ""


def test_an_error_that_is_no_call_is_unknown():
    assert failure_of(grpc.RpcError("never sent")).code is grpc.StatusCode.UNKNOWN


# Over the wire


@pytest.mark.parametrize("call", KINDS)
@pytest.mark.parametrize("kind", ERROR_CLASSES)
async def test_every_error_arrives_as_what_it_is(rig: Rig, kind: type[WeftError], call: str):
    error = of_class(kind)
    rig.calls.before = raises(error)
    texts, raised = await rig.outcome(call)
    assert texts == []
    assert raised is not None
    assert failure_of(raised) == failure(error)
    assert rpc_status.from_call(raised) == status_of(error)
    finished = await rig.next_finished()
    assert (finished.method, finished.code, finished.reason) == (f"/{SERVICE}/{call}", error.code, error.reason)


@pytest.mark.parametrize("call", STREAMING)
@pytest.mark.parametrize("kind", ERROR_CLASSES)
async def test_every_error_arrives_after_messages(rig: Rig, kind: type[WeftError], call: str):
    error = of_class(kind)
    rig.calls.after = raises(error)
    texts, raised = await rig.outcome(call)
    assert texts == ["first"]
    assert raised is not None
    assert failure_of(raised) == failure(error)


@pytest.mark.parametrize("call", KINDS)
async def test_a_blocking_client_reads_the_same(rig: Rig, call: str):
    error = of_class(errors.Overloaded)
    rig.calls.before = raises(error)

    def call_and_wait() -> Failure | None:
        with grpc.insecure_channel(rig.address) as channel:
            path = f"/{SERVICE}/{call}"
            try:
                match call:
                    case "UnaryUnary":
                        channel.unary_unary(path)(b"", timeout=10)
                    case "UnaryStream":
                        list(channel.unary_stream(path)(b"", timeout=10))
                    case "StreamUnary":
                        channel.stream_unary(path)(iter([b""]), timeout=10)
                    case _:
                        list(channel.stream_stream(path)(iter([b""]), timeout=10))
            except grpc.RpcError as raised:
                return failure_of(raised)
        return None

    assert await asyncio.to_thread(call_and_wait) == failure(error)


@pytest.mark.parametrize("call", KINDS)
async def test_success_passes_and_is_counted(rig: Rig, call: str):
    texts, error = await rig.outcome(call, generation_pb2.GenerateRequest(text="x").SerializeToString())
    assert error is None
    assert texts == (["first", "last"] if call in STREAMING else [])
    finished = await rig.next_finished()
    assert (finished.code, finished.reason) == ("OK", "")
    assert 0 <= finished.duration_s < 10


@pytest.mark.parametrize("call", KINDS)
@pytest.mark.parametrize(
    "bug",
    [ValueError(CANARY), KeyError(CANARY), TimeoutError(CANARY), ExceptionGroup(CANARY, [ValueError(CANARY)])],
    ids=lambda bug: type(bug).__name__,
)
async def test_a_bug_is_internal_and_tells_nothing(
    rig: Rig, bug: Exception, call: str, caplog: pytest.LogCaptureFixture
):
    rig.calls.after = raises(bug)
    _, raised = await rig.outcome(call)
    assert raised is not None
    assert failure_of(raised) == failure(WeftError("INTERNAL", "internal error"))
    assert CANARY not in repr(raised) + repr(raised.trailing_metadata())
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.name == "weft.api.interceptors"
    assert record.exc_info is not None
    assert CANARY in caplog.text
    assert "in answer" in caplog.text  # the traceback leads to the line that raised
    assert (await rig.next_finished()).reason == "INTERNAL"


async def test_without_the_interceptor_a_bug_would_leak(rig: Rig):
    """Negative control: the canary does reach the client when nothing stops it."""
    async with (
        serving(Calls(before=raises(ValueError(CANARY)))) as (_, address),
        grpc.aio.insecure_channel(address) as rig.channel,
    ):
        _, raised = await rig.outcome("UnaryUnary")
    assert raised is not None
    assert raised.code() is grpc.StatusCode.UNKNOWN
    assert CANARY in str(raised.details())


@pytest.mark.parametrize("call", KINDS)
async def test_bytes_that_are_no_message_are_not_our_bug(rig: Rig, call: str, caplog: pytest.LogCaptureFixture):
    _, raised = await rig.outcome(call, b"\xff\xff\xff")
    assert raised is not None
    assert raised.code() is grpc.StatusCode.INTERNAL
    assert failure_of(raised).reason == "MESSAGE_MALFORMED"
    assert caplog.records == []


@pytest.mark.parametrize("call", KINDS)
async def test_a_response_of_the_wrong_type_is_internal(rig: Rig, call: str):
    rig.calls.response = lambda text: None
    _, raised = await rig.outcome(call)
    assert raised is not None
    assert failure_of(raised) == failure(WeftError("INTERNAL", "internal error"))


async def test_an_unknown_method_is_not_counted(rig: Rig):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.channel.unary_unary(f"/{SERVICE}/{CANARY}")(b"")
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await rig.outcome("UnaryUnary")
    assert (await rig.next_finished()).method == f"/{SERVICE}/UnaryUnary"


@pytest.mark.parametrize("call", ["UnaryUnary", "UnaryStream"])
async def test_a_status_that_the_handler_sets_is_kept_and_counted(rig: Rig, call: str):
    async def abort(request: Message, context: Context) -> None:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by hand")

    rig.calls.unary = rig.calls.stream = abort
    _, raised = await rig.outcome(call)
    assert raised is not None
    assert failure_of(raised) == Failure(
        code=grpc.StatusCode.OUT_OF_RANGE, reason="", message="by hand", metadata={}, retry_after_s=None
    )
    assert (await rig.next_finished()).code == "OUT_OF_RANGE"


async def test_a_broken_observer_breaks_no_call(rig: Rig, caplog: pytest.LogCaptureFixture):
    def observe(call: FinishedCall) -> None:
        raise ValueError(CANARY)

    async with (
        serving(Calls(), StatusInterceptor(observe)) as (_, address),
        grpc.aio.insecure_channel(address) as rig.channel,
    ):
        assert await rig.outcome("UnaryUnary") == ([], None)
    assert CANARY in caplog.text


# Callers that go away


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("call", KINDS)
@pytest.mark.parametrize("how", ["cancel", "deadline", "channel closed"])
async def test_a_caller_that_goes_away_is_no_error(rig: Rig, call: str, how: str, caplog: pytest.LogCaptureFixture):
    rig.calls.after = forever
    started = rig.start(call, timeout_s=0.2 if how == "deadline" else None)
    if call in STREAMING:
        assert generation_pb2.GenerateResponse.FromString(await started.read()).text == "first"
    else:
        await asyncio.sleep(0.1)
    if how == "cancel":
        started.cancel()
    if how == "channel closed":
        await rig.channel.close()
    async with asyncio.timeout(5):
        await rig.calls.closed.wait()
    finished = await rig.next_finished()
    assert (finished.code, finished.reason) == ("DEADLINE_EXCEEDED" if how == "deadline" else "CANCELLED", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("how", ["cancel", "channel closed"])
async def test_a_generator_that_is_sending_is_closed_at_once(rig: Rig, how: str, caplog: pytest.LogCaptureFixture):
    """The caller leaves while a message is being sent: the generator is at its `yield`."""
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def flood(request: Message, context: Context) -> AsyncIterator[Message]:
        try:
            while True:
                yield generation_pb2.GenerateResponse(text="x" * 10_000)
        except BaseException as error:
            ended.set_result(type(error).__name__)
            raise

    generators: list[AsyncIterator[Message]] = []  # held, so that the garbage collector does not close them

    def flood_and_hold(request: Message, context: Context) -> AsyncIterator[Message]:
        generators.append(flood(request, context))
        return generators[-1]

    rig.calls.stream = flood_and_hold
    call = rig.start("UnaryStream", timeout_s=None)
    await call.read()
    if how == "cancel":
        call.cancel()
    else:
        await asyncio.sleep(0.1)  # until flow control holds the sender back
        await rig.channel.close()
    async with asyncio.timeout(5):
        assert await ended == "GeneratorExit"
    assert (await rig.next_finished()).code == "CANCELLED"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_error_made_of_a_cancellation_is_no_error(rig: Rig, caplog: pytest.LogCaptureFixture):
    async def turn_into_an_error() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise errors.Cancelled("CANCELLED", "the caller went away") from None

    rig.calls.before = turn_into_an_error
    call = rig.start("UnaryUnary")
    await asyncio.sleep(0.1)
    call.cancel()
    assert (await rig.next_finished()).reason == "CANCELLED"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("call", KINDS)
async def test_a_cancellation_that_is_not_the_callers_is_answered(rig: Rig, call: str):
    """Without this gRPC would send nothing, and the caller would wait until its deadline."""
    rig.calls.before = raises(asyncio.CancelledError())
    started_at = time.monotonic()
    _, raised = await rig.outcome(call)
    assert raised is not None
    assert failure_of(raised).reason == "INTERNAL"
    assert time.monotonic() - started_at < 5


async def test_calls_that_a_stopping_server_cuts_are_unavailable(rig: Rig):
    rig.calls.before = forever
    outcome = asyncio.create_task(rig.outcome("UnaryUnary"))
    await asyncio.sleep(0.1)
    await rig.server.stop(0)
    _, raised = await outcome
    assert raised is not None
    assert raised.code() is grpc.StatusCode.UNAVAILABLE
    assert (await rig.next_finished()).code == "CANCELLED"
