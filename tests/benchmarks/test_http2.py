"""The light client gets the same answers from a real gRPC server as gRPC's own client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from benchmarks.backends import http2
from benchmarks.backends.http2 import Connection

_PATH = "/test.Echo/Stream"
T = TypeVar("T")


class _Echo(grpc.GenericRpcHandler):
    """Answers b"n" with n messages of growing size, each when the one before was sent; b"x" with a failure."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != _PATH:
            return None

        async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            if request.startswith(b"x"):
                await context.abort(grpc.StatusCode.NOT_FOUND, "no")
            for index in range(int(request.split()[0])):
                await asyncio.sleep(0.002)
                yield bytes([index % 256]) * (index * 300)

        return grpc.unary_stream_rpc_method_handler(stream)


def _with_server(use: Callable[[int, Connection], Awaitable[T]]) -> T:
    async def run() -> T:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Echo(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        try:
            return await asyncio.wait_for(use(port, connection), 30)
        finally:
            transport.close()
            await server.stop(None)

    return asyncio.run(run())


def test_streams_side_by_side_give_what_grpcs_client_gets() -> None:
    asked = [str(count).encode() for count in (1, 5, 40, 3, 17)]

    async def use(port: int, connection: Connection) -> tuple[list[Any], list[list[bytes]]]:
        ours = await asyncio.gather(*(connection.stream(_PATH, one, f"127.0.0.1:{port}") for one in asked))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            theirs = [[message async for message in channel.unary_stream(_PATH)(one)] for one in asked]
        return ours, theirs

    ours, theirs = _with_server(use)
    assert [[message for _, message in stream] for stream in ours] == theirs
    for stream in ours:
        times = [came_s for came_s, _ in stream]
        assert times == sorted(times)
        assert len(set(times)) > len(times) / 2, "each is noted when it came, not at the end"


def test_many_requests_wait_for_the_servers_window() -> None:
    """Two megabytes of requests, where a server takes 64 kilobytes before it has read some."""

    async def use(port: int, connection: Connection) -> list[int]:
        asked = [b"2 " + b"." * 40_000] * 50
        answers = await asyncio.gather(*(connection.stream(_PATH, one, f"127.0.0.1:{port}") for one in asked))
        await asyncio.sleep(0.1)
        assert connection._window > 2**15, "what was sent has been given back"
        return [len(stream) for stream in answers]

    assert _with_server(use) == [2] * 50


@pytest.mark.parametrize(("path", "message"), [(_PATH, b"x"), ("/test.Echo/Unknown", b"1")])
def test_a_failed_call_is_an_error(path: str, message: bytes) -> None:
    async def use(port: int, connection: Connection) -> None:
        with pytest.raises(RuntimeError, match="the call failed"):
            await connection.stream(path, message, f"127.0.0.1:{port}")
        assert len(await connection.stream(_PATH, b"2", f"127.0.0.1:{port}")) == 2, "the connection goes on"

    _with_server(use)


def test_a_server_that_goes_is_an_error() -> None:
    async def use(port: int, connection: Connection) -> None:
        call = asyncio.create_task(connection.stream(_PATH, b"9999", f"127.0.0.1:{port}"))
        await asyncio.sleep(0.05)
        connection.connection_lost(None)
        with pytest.raises(ConnectionError):
            await call

    _with_server(use)


@pytest.mark.parametrize("size", [1, 2**14, 2**14 + 1, 40_007])
def test_a_body_is_sent_in_frames_that_every_peer_takes(size: int) -> None:
    sent, body, flags = http2._data(5, b"." * size), b"", []
    while sent:
        length = int.from_bytes(sent[:3])
        assert length <= 2**14
        flags.append(sent[4])
        body, sent = body + sent[9 : 9 + length], sent[9 + length :]
    assert body == b"." * size
    assert flags == [0] * (len(flags) - 1) + [1]  # the last ends the stream
