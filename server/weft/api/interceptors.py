"""The interceptor of every call: one terminal status, and one record of it.

Handlers raise WeftError, and leave statuses to the interceptor. Any other exception is our bug: it is logged with its
traceback and answered with a fixed text, because exception texts hold paths, prompts and other tenants' names. By
default gRPC would answer UNKNOWN with the exception's text, also if it cannot parse a request or serialize a response.
So requests are parsed and responses are serialized here.

Handlers that are async generators are also iterated here, so that the end of a call closes the generator at once rather
than when it is garbage-collected.

A caller that does not read its stream blocks the write to it, and would for ever: flow control never times out. So each
write has a time limit.
"""

import asyncio
import contextlib
import inspect
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from weft.api.status import status_of, trailing_metadata
from weft.errors import DeadlineExceeded, WeftError, chain

logger = logging.getLogger(__name__)

# Both have the code INTERNAL, which gRPC documents for bytes that are no message; the reason distinguishes our bugs.
_INTERNAL = "INTERNAL"
_MALFORMED = "MESSAGE_MALFORMED"

_ABORT_S = 1.0  # a status can wait behind unread messages; it is sent when they are, even if it is no longer awaited

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCall:
    """A call that has its terminal status.

    method: full name, such as "/weft.v1.GenerationService/Generate"; always one that the server handles.
    code: name of the gRPC code, such as "OK".
    reason: that of the WeftError, else "".
    duration_s: from the start of the handler to its end.
    """

    method: str
    code: str
    reason: str
    duration_s: float


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Turns the exceptions of handlers into statuses, and passes each finished call to `observe`, on the event loop.

    require: raises WeftError for a parsed request that no handler should see. write_timeout_s: of each message of a
    stream.
    """

    def __init__(
        self,
        observe: Callable[[FinishedCall], None],
        *,
        require: Callable[[Message], None] = lambda message: None,
        write_timeout_s: float | None = None,
    ) -> None:
        self._observe = observe
        self._require = require
        self._write_timeout_s = write_timeout_s

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrapped(handler, handler_call_details.method)

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        answer: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        parse = self._parser(handler.request_deserializer)
        serialize = handler.response_serializer or _unchanged
        take = _unchanged if handler.request_streaming else parse

        async def unary(request: Any, context: Context) -> Any:
            try:
                async with self._one_status(method, context):
                    return serialize(await answer(take(request), context))
            finally:
                del request  # gRPC keeps the exception of an aborted call, and its traceback keeps this frame

        async def stream(request: Any, context: Context) -> None:
            try:
                async with self._one_status(method, context):
                    await self._write_all(answer(take(request), context), context)
            finally:
                del request

        match handler.request_streaming, handler.response_streaming:
            case False, False:
                return grpc.unary_unary_rpc_method_handler(unary)
            case False, True:
                return grpc.unary_stream_rpc_method_handler(stream, None, serialize)
            case True, False:
                return grpc.stream_unary_rpc_method_handler(unary, parse)
            case _:
                return grpc.stream_stream_rpc_method_handler(stream, parse, serialize)

    @asynccontextmanager
    async def _one_status(self, method: str, context: Context) -> AsyncIterator[None]:
        started = time.perf_counter()
        code, reason = grpc.StatusCode.UNKNOWN, ""
        try:
            yield
            code = context.code() or grpc.StatusCode.OK  # None if the handler set none
        except WeftError as error:
            code, reason = grpc.StatusCode[error.code], error.reason
            await _abort(context, error)
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                code = _code_of_gone_caller(context)
                raise
            # Something that the handler awaited was cancelled; gRPC would blame the caller and send no answer.
            code, reason = grpc.StatusCode.INTERNAL, _INTERNAL
            await _abort_unexpected(context, method)
        except GeneratorExit:
            code = _code_of_gone_caller(context)
            raise
        except grpc.aio.InternalError as error:
            # A message could not be sent or read: the call ended an instant ago, and no caller is left to answer.
            code = _code_of_gone_caller(context)
            raise asyncio.CancelledError from error
        except Exception:
            code, reason = grpc.StatusCode.INTERNAL, _INTERNAL
            await _abort_unexpected(context, method)
        finally:
            duration_s = time.perf_counter() - started
            self._report(FinishedCall(method=method, code=code.name, reason=reason, duration_s=duration_s))

    async def _write_all(self, answers: Any, context: Context) -> None:
        """Send the messages of an async generator; a handler that is a coroutine writes its own."""
        if inspect.isawaitable(answers):
            await answers
            return
        async with aclosing(answers):
            async for message in answers:
                await write(context, message, self._write_timeout_s)

    def _parser(self, deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        def parse(serialized: bytes) -> Any:
            if deserialize is None:
                return serialized
            try:
                message = deserialize(serialized)
            except DecodeError as error:
                raise WeftError(_MALFORMED, "the request message cannot be parsed") from error
            self._require(message)
            return message

        return parse

    def _report(self, call: FinishedCall) -> None:
        try:
            self._observe(call)
        except Exception:
            logger.exception("the observer of finished calls failed")


async def write(context: Context, message: Any, timeout_s: float | None) -> None:
    """Send a message of a stream. Raises DeadlineExceeded STREAM_STALLED if its caller does not read it in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        text = f"the caller does not read its stream: a message waited for {timeout_s:g} s"
        raise DeadlineExceeded("STREAM_STALLED", text, metadata={"limit": timeout_s}) from None


async def _abort(context: Context, error: WeftError) -> None:
    status = status_of(error)
    _clear_frames()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_S):
            await context.abort(grpc.StatusCode[error.code], status.message, trailing_metadata(status))


async def _abort_unexpected(context: Context, method: str) -> None:
    logger.exception("%s failed with an unexpected exception", method)
    await _abort(context, WeftError(_INTERNAL, "internal error"))


def _clear_frames() -> None:
    """Drop the local variables of the frames that the current exception has left.

    gRPC keeps a call and the exception that aborted it in a cycle, until Python's collector finds it. A message of
    1 MiB can take 50 MB parsed, so a few hundred refused calls would hold all memory.
    """
    error = sys.exception()
    for found in () if error is None else chain(error):
        traceback.clear_frames(found.__traceback__)


def _code_of_gone_caller(context: Context) -> grpc.StatusCode:
    remaining_s: float | None = context.time_remaining()  # None without a deadline
    if remaining_s is not None and remaining_s <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _unchanged(message: Any) -> Any:
    return message
