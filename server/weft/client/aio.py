"""Client for asyncio: its calls are awaited."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from weft.client import calls
from weft.client.calls import Rpc, Stubs
from weft.client.failure import failure_of
from weft.client.threads import Client
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the call; the server stops working on it."""
        self._call.cancel()

    async def _messages(self) -> AsyncGenerator[Any, None]:
        try:
            async for message in self._call:
                yield message
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error
        finally:
            self.close()


class AsyncDeltas(_Reading, Answering):
    """The deltas of an answer, and its `request_id` and `finish`."""

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async with aclosing(self._messages()) as messages:
            async for message in messages:
                for delta in self._new_in(message):
                    yield delta


class AsyncWatch(_Reading):
    """Changes of the registered adapters."""

    def __aiter__(self) -> AsyncIterator[WatchAdaptersResponse]:
        return self._messages()


def _answering(described: Callable[P, Rpc[Answer]]) -> "Callable[Concatenate[AsyncClient, P], Awaitable[Answer]]":
    def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[Answer]:
        return client.make(described(*args, **kwargs))

    return documented(method, described)


def _answering_in_thread(
    described: Callable[P, Rpc[Answer]],
) -> "Callable[Concatenate[AsyncClient, P], Awaitable[Answer]]":
    """Return a method as `_answering` does, which makes a call that streams files in a thread, on its own connection.

    grpc.aio now and then loses the status of a stream that the server ends early, and reports INTERNAL.
    """

    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        with Client(client.server, timeout_s=client.timeout_s) as in_thread:  # leaving it ends the call
            return await asyncio.to_thread(lambda: in_thread.make(described(*args, **kwargs)))

    return documented(method, described)


def _streaming(
    described: Callable[P, Rpc[Any]], kind: Callable[[Any], Stream]
) -> "Callable[Concatenate[AsyncClient, P], Stream]":
    def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Stream:
        return kind(client.begin(described(*args, **kwargs)))

    return documented(method, described)


class AsyncClient:
    """One connection, made in the event loop that uses it; otherwise the same as Client."""

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout_s: float | None = None) -> None:
        self.server = server
        self.timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(server, options=channel_options())
        self._stubs: Any = Stubs.on(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls that are still running."""
        await self._channel.close()

    def begin(self, rpc: Rpc[Any]) -> Any:
        """Begin gRPC's call for `rpc`."""
        return rpc.method(self._stubs)(rpc.request, timeout=rpc.deadline_s(self.timeout_s))

    async def make(self, rpc: Rpc[Answer]) -> Answer:
        """Make the call of `rpc` and return its answer."""
        try:
            return rpc.answer(await self.begin(rpc))
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error

    generate = _answering(calls.generate)
    stream = _streaming(calls.stream, AsyncDeltas)
    tokenize = _answering(calls.tokenize)
    model_info = _answering(calls.model_info)

    register = _answering(calls.register)
    upload = _answering_in_thread(calls.upload)
    unregister = _answering(calls.unregister)
    adapter = _answering(calls.adapter)
    load = _answering(calls.load)
    unload = _answering(calls.unload)
    watch = _streaming(calls.watch, AsyncWatch)

    async def adapters(self, *, method: str = "", state: str = "") -> list[Adapter]:
        """Return the registered adapters by id, or those of one method ("lora") and one state ("active")."""
        page = await self.make(calls.page(method, state, ""))
        found = list(page.adapters)
        while page.next_page_token:
            page = await self.make(calls.page(method, state, page.next_page_token))
            found += page.adapters
        return found
