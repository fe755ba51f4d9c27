"""Client for threads: its calls block."""

from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc

from weft.client import calls
from weft.client.calls import Rpc, Stubs
from weft.client.failure import failure_of
from weft.client.wire import Answering, RpcFailure, channel_options, documented
from weft.v1.adapter_pb2 import Adapter
from weft.v1.adapter_service_pb2 import WatchAdaptersResponse
from weft.v1.endpoint import DEFAULT_SERVER
from weft.v1.generation_pb2 import Delta

P = ParamSpec("P")
Answer = TypeVar("Answer")
Stream = TypeVar("Stream")


class _Reading:
    """A stream that is being read; leaving its context ends the call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the call; the server stops working on it."""
        self._call.cancel()

    def _messages(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error
        finally:
            self.close()


class Deltas(_Reading, Answering):
    """The deltas of an answer, and its `request_id` and `finish`."""

    def __iter__(self) -> Iterator[Delta]:
        for message in self._messages():
            yield from self._new_in(message)


class Watch(_Reading):
    """Changes of the registered adapters."""

    def __iter__(self) -> Iterator[WatchAdaptersResponse]:
        return self._messages()


def _answering(described: Callable[P, Rpc[Answer]]) -> "Callable[Concatenate[Client, P], Answer]":
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        return client.make(described(*args, **kwargs))

    return documented(method, described)


def _streaming(
    described: Callable[P, Rpc[Any]], kind: Callable[[Any], Stream]
) -> "Callable[Concatenate[Client, P], Stream]":
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Stream:
        return kind(client.begin(described(*args, **kwargs)))

    return documented(method, described)


class Client:
    """One connection, which several threads may share.

    server: "host:port".
    timeout_s: the deadline of every call; `upload` and `unregister` extend it as needed. None is a minute for calls
        that answer at once, and no deadline for `generate` and `stream`.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(server, options=channel_options())
        self._stubs = Stubs.on(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the calls that are still running."""
        self._channel.close()

    def begin(self, rpc: Rpc[Any]) -> Any:
        """Begin gRPC's call for `rpc`."""
        return rpc.method(self._stubs)(rpc.request, timeout=rpc.deadline_s(self._timeout_s))

    def make(self, rpc: Rpc[Answer]) -> Answer:
        """Make the call of `rpc` and return its answer."""
        try:
            return rpc.answer(self.begin(rpc))
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error

    generate = _answering(calls.generate)
    stream = _streaming(calls.stream, Deltas)
    tokenize = _answering(calls.tokenize)
    model_info = _answering(calls.model_info)

    register = _answering(calls.register)
    upload = _answering(calls.upload)
    unregister = _answering(calls.unregister)
    adapter = _answering(calls.adapter)
    load = _answering(calls.load)
    unload = _answering(calls.unload)
    watch = _streaming(calls.watch, Watch)

    def adapters(self, *, method: str = "", state: str = "") -> list[Adapter]:
        """Return the registered adapters by id, or those of one method ("lora") and one state ("active")."""
        page = self.make(calls.page(method, state, ""))
        found = list(page.adapters)
        while page.next_page_token:
            page = self.make(calls.page(method, state, page.next_page_token))
            found += page.adapters
        return found
