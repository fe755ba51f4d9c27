"""Client for threads: its calls block."""

from collections.abc import Iterator
from typing import Any, Self, TypeVar

import grpc

from weft.client import calls
from weft.client.calls import Rpc
from weft.client.credentials import Credentials
from weft.client.failure import failure_of
from weft.client.wire import Answering, Connection, Reading, RpcFailure, method
from weft.v1.adapter_pb2 import Adapter
from weft.v1.adapter_service_pb2 import WatchAdaptersResponse
from weft.v1.endpoint import DEFAULT_SERVER
from weft.v1.generation_pb2 import Delta

Answer = TypeVar("Answer")


class _Reading(Reading):
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


class Client(Connection):
    """One connection, which several threads may share.

    server: "host:port".
    timeout_s: the deadline of every call; `upload` and `unregister` extend it as needed. None is a minute for calls
        that answer at once, and no deadline for `generate` and `stream`.
    credentials: token and TLS; None takes them from the environment, and Credentials() is none.
    """

    def __init__(
        self, server: str = DEFAULT_SERVER, *, timeout_s: float | None = None, credentials: Credentials | None = None
    ) -> None:
        super().__init__(server, timeout_s, credentials, grpc)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the calls that are still running."""
        self._channel.close()

    def make(self, rpc: Rpc[Answer]) -> Answer:
        """Make the call of `rpc` and return its answer."""
        try:
            return rpc.answer(self.begin(rpc))
        except grpc.RpcError as error:
            raise RpcFailure(failure_of(error)) from error

    generate = method(calls.generate, make)
    stream = method(calls.stream, lambda client, rpc: Deltas(client.begin(rpc)))
    tokenize = method(calls.tokenize, make)
    model_info = method(calls.model_info, make)

    register = method(calls.register, make)
    upload = method(calls.upload, make)
    unregister = method(calls.unregister, make)
    adapter = method(calls.adapter, make)
    load = method(calls.load, make)
    unload = method(calls.unload, make)
    lift_quarantine = method(calls.lift_quarantine, make)
    watch = method(calls.watch, lambda client, rpc: Watch(client.begin(rpc)))

    def adapters(self, *, method: str = "", state: str = "") -> list[Adapter]:
        """Return the registered adapters by id, or those of one method ("lora") and one state ("active")."""
        page = self.make(calls.page(method, state, ""))
        found = list(page.adapters)
        while page.next_page_token:
            page = self.make(calls.page(method, state, page.next_page_token))
            found += page.adapters
        return found
