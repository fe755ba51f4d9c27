"""A client of a Weft server: `Client` for threads, `AsyncClient` for asyncio, with the same methods.

    with Client("127.0.0.1:50051") as client:
        client.upload("reverse", "runs/reverse")
        print(client.generate("warp", adapter="reverse", max_new_tokens=8).text)
        with client.stream("warp", adapter={"reverse": 0.5, "upper": 0.5}, temperature=0.0) as stream:
            for delta in stream:
                print(delta.text, end="")
        print(stream.finish.usage.completion_tokens)

What is asked is written once, in `weft.client.calls`; the two clients differ only in how they make a call. Answers are
the messages of `weft.v1`, whose protos say what each field means. A call that fails raises RpcFailure.

Every call but `watch` has a deadline. After UNAVAILABLE, and after nothing else, unary calls that can be repeated
without harm are tried again, by gRPC itself.
"""

import asyncio
import functools
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from weft.api.status import Failure, failure_of
from weft.client import calls
from weft.client.calls import Completion, Conversation, Parameters, Prompt, Rpc, Stubs, Target
from weft.config import MIB
from weft.settings import DEFAULT_SERVER
from weft.v1 import adapter_service_pb2, generation_service_pb2
from weft.v1.adapter_pb2 import Adapter
from weft.v1.adapter_service_pb2 import WatchAdaptersResponse
from weft.v1.adapter_service_pb2_grpc import AdapterServiceStub
from weft.v1.generation_pb2 import Delta, Finish, StreamGenerateResponse
from weft.v1.generation_service_pb2_grpc import GenerationServiceStub

__all__ = [
    "AsyncClient",
    "AsyncDeltas",
    "AsyncWatch",
    "Client",
    "Completion",
    "Conversation",
    "Deltas",
    "Failure",
    "Parameters",
    "Prompt",
    "RpcFailure",
    "Target",
    "Watch",
]

P = ParamSpec("P")
Answer = TypeVar("Answer")
Opened = TypeVar("Opened")

_DEADLINE_S = 60.0
_RECEIVE_BYTES_MAX = 64 * MIB  # Tokenize with pieces passes gRPC's own 4 MiB
_NOT_REPEATABLE = frozenset({"UnregisterAdapter"})  # the second one would say that there is no such adapter


class RpcFailure(Exception):
    """A call that failed; `failure` has the code, the reason that programs compare, and the retry delay if any."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.reason or failure.code.name}: {failure.message}")
        self.failure = failure


def _channel_options() -> list[tuple[str, Any]]:
    services = (
        generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"],
        adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    )
    repeatable = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if not (method.client_streaming or method.server_streaming or method.name in _NOT_REPEATABLE)
    ]
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": repeatable, "retryPolicy": retry}]}
    return [("grpc.service_config", json.dumps(config)), ("grpc.max_receive_message_length", _RECEIVE_BYTES_MAX)]


class _Answering:
    """What the messages of an answer told beside their deltas."""

    request_id = ""
    _finish: Finish | None = None

    @property
    def finish(self) -> Finish:
        """How the answer ended; RuntimeError before it has been read to its end."""
        if self._finish is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._finish

    def _new_in(self, message: StreamGenerateResponse) -> list[Delta]:
        self.request_id = self.request_id or message.request_id
        if message.HasField("finish"):
            self._finish = message.finish
        return [message.delta] if message.HasField("delta") else []


# ---- Threads


class Client:
    """Calls that block; one client may be shared by threads.

    server: "host:port".
    timeout_s: the deadline of every call; `upload` and `unregister` add what they may need.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout_s: float = _DEADLINE_S) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(server, options=_channel_options())
        self._stubs = Stubs(GenerationServiceStub(self._channel), AdapterServiceStub(self._channel))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the calls that are still running."""
        self._channel.close()

    def make(self, rpc: Rpc[Answer]) -> Answer:
        """Make a call that `weft.client.calls` describes."""
        try:
            response = rpc.method(self._stubs)(rpc.request, timeout=rpc.deadline_s(self._timeout_s))
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error
        return rpc.answer(response)

    def open(self, rpc: Rpc[Any]) -> Any:
        """Begin a call that is answered by a stream."""
        return rpc.method(self._stubs)(rpc.request, timeout=rpc.deadline_s(self._timeout_s))

    def adapters(self, *, method: str = "", state: str = "") -> list[Adapter]:
        """The registered adapters by id, all or those of one method ("lora") or state ("active")."""
        found: list[Adapter] = []
        request = calls.first_page(method, state)
        while True:
            page = self.make(calls.page(request))
            found += page.adapters
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


class _Reading:
    """A stream that is being read; to leave it ends its call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the call; the server stops working for it."""
        self._call.cancel()

    def _messages(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error
        finally:
            self.close()


class Deltas(_Reading, _Answering):
    """The deltas of an answer, and its `request_id` and `finish`."""

    def __iter__(self) -> Iterator[Delta]:
        for message in self._messages():
            yield from self._new_in(message)


class Watch(_Reading):
    """What happens to the adapters."""

    def __iter__(self) -> Iterator[WatchAdaptersResponse]:
        return self._messages()
