"""Client for asyncio: its calls are awaited."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from weft.client import calls
from weft.client.calls import Rpc
from weft.client.credentials import Credentials
from weft.client.failure import failure_of
from weft.client.threads import Client
from weft.client.wire import Answering, Connection, Reading, RpcFailure, documented, method
from weft.v1.adapter_pb2 import Adapter
from weft.v1.adapter_service_pb2 import WatchAdaptersResponse
from weft.v1.endpoint import DEFAULT_SERVER
from weft.v1.generation_pb2 import Delta

P = ParamSpec("P")
Answer = TypeVar("Answer")


class _Reading(Reading):
    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

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


def _in_thread(described: Callable[P, Rpc[Answer]]) -> "Callable[Concatenate[AsyncClient, P], Awaitable[Answer]]":
    """Return a method that reads and streams files in a thread, on a connection of its own.

    grpc.aio now and then loses the status of a stream that the server ends early, and reports INTERNAL.
    """

    async def called(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        connection = Client(client.server, timeout_s=client.timeout_s, credentials=client.credentials)
        with connection as in_thread:  # leaving it ends the call
            return await asyncio.to_thread(lambda: in_thread.make(described(*args, **kwargs)))

    return documented(called, described)


class AsyncClient(Connection):
    """One connection, made in the event loop that uses it; otherwise the same as Client."""

    def __init__(
        self, server: str = DEFAULT_SERVER, *, timeout_s: float | None = None, credentials: Credentials | None = None
    ) -> None:
        super().__init__(server, timeout_s, credentials, grpc.aio)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls that are still running."""
        await self._channel.close()

    async def make(self, rpc: Rpc[Answer]) -> Answer:
        """Make the call of `rpc` and return its answer."""
        try:
            return rpc.answer(await self.begin(rpc))
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error

    generate = method(calls.generate, make)
    stream = method(calls.stream, lambda client, rpc: AsyncDeltas(client.begin(rpc)))
    tokenize = method(calls.tokenize, make)
    model_info = method(calls.model_info, make)

    register = method(calls.register, make)
    upload = _in_thread(calls.upload)
    unregister = method(calls.unregister, make)
    adapter = method(calls.adapter, make)
    load = method(calls.load, make)
    unload = method(calls.unload, make)
    lift_quarantine = method(calls.lift_quarantine, make)
    watch = method(calls.watch, lambda client, rpc: AsyncWatch(client.begin(rpc)))

    async def adapters(self, *, method: str = "", state: str = "") -> list[Adapter]:
        """Return the registered adapters by id, or those of one method ("lora") and one state ("active")."""
        page = await self.make(calls.page(method, state, ""))
        found = list(page.adapters)
        while page.next_page_token:
            page = await self.make(calls.page(method, state, page.next_page_token))
            found += page.adapters
        return found
