"""The interceptor that records every change of adapters: who, what, the digests before and after, how it ended."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from weft.api.access.audit_log import AuditLog
from weft.api.access.principal import CALLER
from weft.api.access.requirements import MUTATIONS
from weft.errors import Code, WeftError

_REQUEST_ID = "x-request-id"
_NAME = re.compile("[A-Za-z0-9._:-]{1,64}")  # shorter than a token

DigestOf = Callable[[str], str]


class AuditInterceptor(grpc.aio.ServerInterceptor):
    """Records the end of each mutation in `log`. It comes after the gate, so that the caller is known.

    digest_of: returns the current digest of an adapter id, or "". It is called when the request has been read and when
    the call has ended; calls for the same id at the same time may come between.
    """

    def __init__(self, log: AuditLog, digest_of: DigestOf) -> None:
        self._log, self._digest_of = log, digest_of

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in MUTATIONS:
            return handler
        answer: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

        async def recorded(request: Any, context: Any) -> Any:
            change = _Change(self._digest_of)
            if handler.request_streaming:
                request = _Upload(request, change)
            else:
                change.begin(request.adapter_id)
            with self._recording(change, handler_call_details, context):
                return await answer(request, context)

        kind: Any = grpc.unary_unary_rpc_method_handler
        if handler.request_streaming:
            kind = grpc.stream_unary_rpc_method_handler
        return kind(recorded, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _recording(self, change: "_Change", call: grpc.HandlerCallDetails, context: Any) -> Iterator[None]:
        """Record how the block ends."""
        code, reason = Code.INTERNAL.value, ""
        try:
            yield
            code = "OK"
        except WeftError as error:
            code, reason = error.code.value, error.reason
            raise
        except asyncio.CancelledError:
            code = Code.CANCELLED.value
            raise
        finally:
            caller = CALLER.get()
            request_ids = [value for key, value in call.invocation_metadata or () if key == _REQUEST_ID]
            self._log.record(
                "rpc",
                rpc=call.method.rpartition("/")[2],
                tenant=caller.tenant,
                token_id=caller.token_id,
                via=caller.via.value,
                peer=context.peer(),
                request_id=_name(request_ids[0]) if request_ids else "",
                adapter_id=_name(change.adapter_id),
                before=change.before,
                after=self._digest_of(change.adapter_id),
                code=code,
                reason=reason,
            )


def _name(given: str | bytes) -> str:
    """Return a name that a caller chose, or "" for what is none, since it could hold a secret."""
    return given if isinstance(given, str) and _NAME.fullmatch(given) else ""


@dataclass(slots=True)
class _Change:
    """The adapter that a call changes, once its request has been read."""

    digest_of: DigestOf
    adapter_id: str = ""
    before: str = ""

    def begin(self, adapter_id: str) -> None:
        self.adapter_id, self.before = adapter_id, self.digest_of(adapter_id)


class _Upload:
    """The messages of an upload, the first of which names the adapter."""

    def __init__(self, messages: AsyncIterator[Any], change: _Change) -> None:
        self._messages, self._change = messages, change

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = await anext(self._messages)
        if not self._change.adapter_id:
            self._change.begin(message.header.adapter_id)  # "" if the first message is no header
        return message
